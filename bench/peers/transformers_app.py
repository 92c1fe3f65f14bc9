"""transformers' own generate, float32, on a checkpoint folder: `python transformers_app.py FOLDER`. Asked and answering as genai_app.py."""

import json
import os
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(os.cpu_count() or 1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print(json.dumps({"reply": "ready"}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    rng = random.Random(0)
    prompts = [[rng.randrange(10, ask["vocabulary"]) for _ in range(ask["prompt"])] for _ in range(ask["streams"])]
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        start = time.perf_counter()
        model(ids)
        first = time.perf_counter() - start
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ask["tokens"],
            min_new_tokens=ask["tokens"],
            do_sample=False,
            pad_token_id=0,
        )
    count = (made.shape[1] - ids.shape[1]) * ids.shape[0]
    print(json.dumps({"reply": {"seconds": time.perf_counter() - start, "first": first, "tokens": count}}), flush=True)
