"""NVIDIA pytriton around the stock model, with Triton's dynamic batcher. Run: python pytriton_app.py FOLDER GRPC_PORT HTTP_PORT
METRICS_PORT
"""

import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from stock_model import StockModel

MODEL = StockModel(sys.argv[1])


@batch
def infer(text):
    return [MODEL.embed([row[0].decode() for row in text]).astype(np.float32)]


if __name__ == "__main__":
    grpc_port, http_port, metrics_port = map(int, sys.argv[2:5])
    config = TritonConfig(
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="minilm",
            infer_func=infer,
            inputs=[Tensor(name="text", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="embedding", dtype=np.float32, shape=(384,))],
            config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=2000)),
        )
        triton.serve()
