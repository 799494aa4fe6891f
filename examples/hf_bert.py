"""Prune a BERT of Hugging Face (random weights) and time it: ``python examples/hf_bert.py``."""

import _torchvision  # noqa: F401  (only for a torchvision that does not fit torch)
import torch
from transformers import BertConfig, BertForSequenceClassification

import structprune
from structprune.benchmarking import benchmark


def main():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(config.vocab_size, (2, 64))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    plan = structprune.plan(model, inputs, ratio=0.5)
    slim = plan.apply(model)
    print(structprune.verify(model, slim, plan, inputs))

    print("before:", structprune.cost(model, inputs))
    print("after: ", structprune.cost(slim, inputs))
    print(benchmark({"dense": model, "slim": slim}, inputs, runs=20))


if __name__ == "__main__":
    main()
