"""Complete the inputs of a few samples with transformers alone, from a directory that `megawrap convert` exported.

In: a Hugging Face directory and a JSONL file with `inputs`. Out: the inputs and a sampled completion of each, printed.
Nothing of megawrap is imported: what runs here runs wherever transformers does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def complete(model_dir: Path, prompts: Sequence[str], max_new_tokens: int, seed: int) -> list[str]:
    """Completions drawn at temperature 0.7 (a small model repeats itself when it is greedy), the same for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    completions = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=max_new_tokens, do_sample=True,
                temperature=0.7, top_p=0.95, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        completions.append(tokenizer.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return completions


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="HF_DIR", help="exported directory")
    parser.add_argument("samples", type=Path, metavar="FILE.jsonl", help="samples whose inputs are completed")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="the N samples with the shortest inputs (default: 3)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="(default: 1234)")
    args = parser.parse_args(argv)
    for path in (args.model / "config.json", args.samples):
        if not path.is_file():
            parser.error(f"{path} is not there")
    prompts = sorted((json.loads(line)["inputs"] for line in args.samples.read_text().splitlines()), key=len)[: args.count]
    for prompt, completion in zip(prompts, complete(args.model, prompts, args.max_new_tokens, args.seed), strict=True):
        print(f"--- inputs\n{prompt}--- completion\n{completion.rstrip()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
