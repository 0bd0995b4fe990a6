"""Vectors by vLLM, for ``benchmarks.ladder``; runs in an environment of its own, so it imports nothing of flipkd.

python ladder_vllm.py MODEL TEXTS.json VECTORS.npy
"""

import json
import os
import sys

import numpy as np
from vllm import LLM

if __name__ == "__main__":  # vLLM starts processes that import this file
    folder, source, target = sys.argv[1:]
    model = LLM(model=folder, runner="pooling", enforce_eager=True, dtype="bfloat16")
    with open(source) as file:
        texts = json.load(file)
    found = model.embed(texts, use_tqdm=False)
    with open(target + ".tmp", "wb") as file:
        np.save(file, np.array([one.outputs.embedding for one in found], np.float32))
    os.replace(target + ".tmp", target)
