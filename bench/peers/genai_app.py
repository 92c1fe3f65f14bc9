"""onnxruntime-genai's generator on a folder that its builder made: `python genai_app.py FOLDER`, in its own environment.

One JSON line in, {"streams", "prompt", "tokens", "vocabulary"}; one out: seconds of a batch of equal prompts, and of its prompt alone.
"""

import json
import os
import random
import sys
import time

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime_genai as og

model = og.Model(sys.argv[1])
print(json.dumps({"reply": "ready"}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    rng = random.Random(0)
    prompts = [[rng.randrange(10, ask["vocabulary"]) for _ in range(ask["prompt"])] for _ in range(ask["streams"])]
    parameters = og.GeneratorParams(model)
    total = ask["prompt"] + ask["tokens"]
    parameters.set_search_options(max_length=total, min_length=total, batch_size=ask["streams"], do_sample=False)
    generator = og.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(prompts)
    generator.generate_next_token()
    first = time.perf_counter() - start
    made = 1
    while made < ask["tokens"] and not generator.is_done():
        generator.generate_next_token()
        made += 1
    print(json.dumps({"reply": {"seconds": time.perf_counter() - start, "first": first, "tokens": made * ask["streams"]}}), flush=True)
    del generator
