"""Train the demo model: a 5 M-parameter Llama on the synthetic corpus of `corpus.py`.

python train.py --out DIR --minutes 6        # one GPU; writes a Hugging Face model directory
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 2048
VOCAB = 2048


def _texts(seed_count: tuple[int, int]) -> list[str]:
    rng = random.Random(seed_count[0])
    return [corpus.render(corpus.sample(rng)) for _ in range(seed_count[1])]


def build_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=corpus.SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(_texts((0, 60_000)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = corpus.CHAT_TEMPLATE
    fast.model_max_length = CONTEXT
    fast.save_pretrained(out)
    return fast


def encode(tok: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and loss mask (1 on what the assistant says, its <|end|> included)."""
    assistant, end = tok.token_to_id("<|assistant|>"), tok.token_to_id("<|end|>")
    ids = np.fromiter((i for e in tok.encode_batch(texts, add_special_tokens=False) for i in e.ids), np.int32)
    opened = np.flatnonzero(ids == assistant)
    closed = np.flatnonzero(ids == end)
    closes = closed[np.searchsorted(closed, opened)]
    edge = np.zeros(len(ids) + 2, np.int32)
    np.add.at(edge, opened + 1, 1)
    np.add.at(edge, closes + 1, -1)
    return ids.astype(np.uint16), np.cumsum(edge)[: len(ids)].astype(bool)


def check(model, tok, count: int = 300) -> dict[str, float]:
    """Share of greedy answers that are exactly right, per skill, on unseen conversations."""
    rng = random.Random(987654321)
    right: dict[str, list[bool]] = {}
    skills = [corpus._capital, corpus._sum, corpus._count, corpus._copy, corpus._spell, corpus._needle, corpus._think]
    model.eval()
    for skill in skills:
        for _ in range(count // len(skills)):
            ask, answer = skill(rng)
            prompt = f"<|begin|><|user|>{ask}<|end|><|assistant|>"
            ids = torch.tensor([tok(prompt, add_special_tokens=False).input_ids]).cuda()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=160,
                    do_sample=False,
                    pad_token_id=tok.eos_token_id,
                )
            text = tok.decode(out[0, ids.shape[1] :]).split("<|end|>")[0]
            right.setdefault(skill.__name__[1:], []).append(text == answer)
    return {k: sum(v) / len(v) for k, v in right.items()}


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--minutes", type=float, default=6)
    args.add_argument("--conversations", type=int, default=2_000_000)
    args.add_argument("--batch", type=int, default=64)
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    fast = build_tokenizer(args.out)
    tok = fast.backend_tokenizer
    chunk = 20_000
    ids, mask = [], []
    with multiprocessing.get_context("fork").Pool() as pool:
        for texts in pool.imap_unordered(_texts, [(s + 1, chunk) for s in range(args.conversations // chunk)]):
            i, m = encode(tok, texts)
            ids.append(i)
            mask.append(m)
    ids, mask = np.concatenate(ids), np.concatenate(mask)
    rows = len(ids) // CONTEXT
    ids = torch.from_numpy(ids[: rows * CONTEXT].astype(np.int64)).view(rows, CONTEXT).to(torch.int16).cuda()
    mask = torch.from_numpy(mask[: rows * CONTEXT]).view(rows, CONTEXT).cuda()
    print(f"{rows * CONTEXT / 1e6:.0f} M tokens, {mask.float().mean().item():.2f} of them the assistant's", flush=True)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = LlamaForCausalLM(config).cuda()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    step_model = torch.compile(model)
    peak = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start, limit, step = time.time(), args.minutes * 60, 0
    while True:
        for rows_ in torch.randperm(rows).split(args.batch):
            progress = (time.time() - start) / limit
            if progress >= 1:
                break
            rate = peak * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = ids[rows_.cuda()].long() & 0xFFFF
            labels = torch.where(mask[rows_.cuda()], x, -100)
            with torch.autocast("cuda", torch.bfloat16):
                loss = step_model(input_ids=x, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 200 == 0:
                print(f"step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
        else:
            continue
        break
    model.to(torch.bfloat16).save_pretrained(args.out)
    model.float()
    print(json.dumps({"steps": step, "exact": check(model, fast)}), flush=True)


if __name__ == "__main__":
    main()
