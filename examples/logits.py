"""Scores a text: its log-probability under the model, and bits a token.

`tpx launch examples/logits.py MODEL [TEXT]`, or
`torchrun --nproc-per-node 2 examples/logits.py MODEL [TEXT]`.
"""

import math
import sys

import torch

import tpx

llm = tpx.LLM(sys.argv[1] if len(sys.argv) > 1 else None)
text = sys.argv[2] if len(sys.argv) > 2 else "The value of the first argument"
ids = llm.tokenizer.encode(text)

[logits_TV] = llm.logits([ids])  # on every rank, whole
logprobs_TV = torch.log_softmax(logits_TV[:-1], dim=-1)
logprob = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
if llm.worker.place.rank == 0:
    bits = -logprob / math.log(2) / max(1, len(ids) - 1)
    print(f"{len(ids)} tokens, log-probability {logprob:.3f}, {bits:.3f} bits a token")
