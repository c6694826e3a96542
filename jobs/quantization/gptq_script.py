"""GPTQ (Frantar et al., arXiv 2210.17323) by llm-compressor, run by the Python of its own environment:

    ENV/bin/python -I jobs/quantization/gptq_script.py STUDENT DIRECTORY ROWS.jsonl

Imports nothing of raystill, which that environment does not have. ROWS holds one list of token ids a line.
"""

import json
import sys


def main(student: str, directory: str, rows: str) -> None:
    """Writes the student with 4-bit weights in groups of 128, float activations (W4A16), as compressed-tensors."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    with open(rows, encoding="utf-8") as lines:
        token_ids = [json.loads(line) for line in lines]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, use_safetensors=True)
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in token_ids]),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=max(map(len, token_ids)),
        num_calibration_samples=len(token_ids),
    )
    model.save_pretrained(directory, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
