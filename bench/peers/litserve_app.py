"""LitServe around the stock model, batching as its documentation advises. Run: python litserve_app.py FOLDER PORT"""

import sys

import litserve as ls
from stock_model import StockModel


class Embedder(ls.LitAPI):
    def setup(self, device):
        self.model = StockModel(sys.argv[1])

    def decode_request(self, request):
        return request["text"]

    def batch(self, inputs):
        return inputs

    def predict(self, texts):
        return self.model.embed(texts)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = ls.LitServer(Embedder(max_batch_size=32, batch_timeout=0.002), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
