"""`python eval.py --speed --model ...`: what the sampler costs on this machine, beside the bare forward passes it contains.

To be merged into eval.py. By itself: python speed_section.py --model FOLDER | random | random-8b"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import igpo

SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=8192)
LLADA_8B = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32, vocab_size=126464,
                max_position_embeddings=4096)


def random_model(shape, device, dtype):
    """A model of a given shape with random weights, made on the device itself: nothing is downloaded or copied."""
    config = LlamaConfig(**shape, is_causal=False, mask_token_id=shape["vocab_size"] - 1, bos_token_id=None,
                         eos_token_id=[shape["vocab_size"] - 2], pad_token_id=shape["vocab_size"] - 2)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def matrix_peak(device, size=8192):
    """FLOP/s that this GPU reaches on one large bf16 matrix product: the practical ceiling of everything else."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for repeats in (3, 20):  # the first time to warm up
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            a @ a
        torch.cuda.synchronize()
    return repeats * 2 * size ** 3 / (time.perf_counter() - began)


@torch.no_grad()
def speed_table(model, *, rows=8, prompt_length=64, gen_length=256, block_length=32, steps=128, temperature=0.0,
                threshold=0.9, repeats=1, prompts=None):
    """Time the sampler's variants on the model's device -> a list of dicts, one a variant, the bare forwards first.

    seconds: the fastest of `repeats` runs, taken in turns after a warm-up. tokens_per_second: completion tokens, all
    gen_length of each row. ratio: seconds over those of the bare forwards, `steps` of them with the head at one block.
    flops: achieved FLOP/s. equal: share of tokens equal to the exact sampler's; on random weights it says little."""
    device, config = next(model.parameters()).device, model.config
    if prompts is None:
        prompts = torch.randint(0, min(config.vocab_size, config.mask_token_id), (rows, prompt_length),
                                generator=torch.Generator().manual_seed(0)).to(device)
    (B, P), L, K = prompts.shape, gen_length, block_length
    canvas = torch.nn.functional.pad(prompts, (0, L), value=config.mask_token_id)

    def bare():
        for step in range(steps):
            start = P + step * (L // K) // steps * K
            igpo.logits_at(model, canvas, None, torch.arange(start, start + K, device=device))

    def sampler(**options):
        return lambda: igpo.sample(model, prompts, gen_length=L, block_length=K, steps=steps, temperature=temperature,
                                   generator=igpo.seeded("speed"), **options)

    variants = {"bare forwards": bare, "exact": sampler(), "cache": sampler(cache="block"),
                "threshold": sampler(threshold=threshold), "cache + threshold": sampler(cache="block", threshold=threshold)}
    work = []  # one number a forward pass, its FLOPs
    hook = model.register_forward_pre_hook(with_kwargs=True, hook=lambda model, args, kwargs: work.append(
        igpo.flops(config, B, P + L, K, queries=kwargs["input_ids"].shape[1])))
    table, outputs = {}, {}
    try:
        for function in (variants["cache"], variants["exact"]):  # warm up
            function()
        for _ in range(repeats):
            for name, function in variants.items():
                work.clear()
                wait(device)
                began = time.perf_counter()
                outputs[name] = function()
                wait(device)
                seconds = min(time.perf_counter() - began, table.get(name, {}).get("seconds", float("inf")))
                table[name] = dict(variant=name, seconds=seconds, tokens_per_second=B * L / seconds, forwards=len(work),
                                   flops=sum(work) / seconds)
    finally:
        hook.remove()
    for name, row in table.items():
        row["ratio"] = row["seconds"] / table["bare forwards"]["seconds"]
        row["equal"] = None if name == "bare forwards" else (outputs[name] == outputs["exact"]).float().mean().item()
    return list(table.values())


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_speed(model, **settings):
    """speed_table as Markdown, with the device's name: what the README shows."""
    device = next(model.parameters()).device
    table = speed_table(model, **settings)
    name, peak = f"CPU, {torch.get_num_threads()} thread(s)", None
    if device.type == "cuda":
        name, peak, measured = torch.cuda.get_device_name(device), None, matrix_peak(device)
        peak = igpo.peak_flops(name)
        name += f", {measured / 1e12:.0f} TFLOP/s measured on a bf16 matrix product" + (f", {peak / 1e12:.0f} by data sheet" if peak else "")
    print(f"{name}\n\n| | seconds | tokens/s | forwards | x bare | TFLOP/s |{' of measured peak |' if peak else ''} equal tokens |")
    print("|---|" + "---|" * (7 if peak else 6))
    for r in table:
        equal = "" if r["equal"] is None else f"{r['equal']:.1%}"
        share = f" {r['flops'] / measured:.0%} |" if peak else ""
        print(f"| {r['variant']} | {r['seconds']:.2f} | {r['tokens_per_second']:.1f} | {r['forwards']} | {r['ratio']:.2f} | "
              f"{r['flops'] / 1e12:.3g} |{share} {equal} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="random", help="a folder, a hub name, random (small) or random-8b (LLaDA-8B's shape)")
    for flag, default in dict(rows=8, prompt_length=64, gen_length=256, block_length=32, steps=128, repeats=1).items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threshold", type=float, default=0.9)
    settings = vars(parser.parse_args())
    name, device = settings.pop("model"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = {"random": SMALL, "random-8b": LLADA_8B}
    model = random_model(shapes[name], device, dtype) if name in shapes else igpo.load_model(name, dtype=dtype, device=device)[0]
    print_speed(model, **settings)
