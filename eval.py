"""Accuracy of masked diffusion LMs on GSM8K, MATH500, AMC and Minerva.

    python eval.py --model GSAI-ML/LLaDA-8B-Instruct             torchrun: the same on many GPUs
    python eval.py --model FOLDER --tasks math500 --data math500=FILE.jsonl --limit 20
    python eval.py --rescore runs/eval-NAME/samples.jsonl        grade again, without a model
    python eval.py --compare runs/igpo-* runs/grpo-*             finished RL runs side by side
    python eval.py --ask "What is 7 times 8?" --model FOLDER     watch an answer being denoised
    python eval.py --speed --model random                        time the sampler's variants

The protocol is the paper's: greedy, for AMC the mean over 16 answers at temperature 0.1 (avg@16).
A killed evaluation continues with the same command, sample for sample, on any number of processes.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import sys
import time
import zlib
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import igpo
from igpo import UsageError, file_errors, flag

@dataclasses.dataclass
class Config:
    """Every setting, every one a flag."""
    model: str | None = flag(None, "folder or hub name, for --speed random or random-8b too")
    tasks: str = flag("gsm8k,math500,amc,minerva", "what to measure")
    data: str = flag("", "problems not from the hub: gsm8k=FILE.jsonl,amc=FILE.csv")
    limit: int | None = flag(None, "the first problems of each task only", "1..1e9")
    out_dir: str | None = flag(None, "folder for the results; default: runs/eval-MODEL")
    seed: int = flag(0, "seed of everything random", "0..1e9")
    gen_length: int = flag(256, "completion length, tokens", "1..1e6")
    diffusion_steps: int = flag(128, "denoising steps for a completion", "1..1e6")
    block_length: int = flag(32, "tokens in a semi-autoregressive block", "1..1e6")
    batch_size: int = flag(16, "samples in a batch", "1..1e6")
    amc_temperature: float = flag(0.1, "of amc; all else is greedy", "0..100")
    amc_samples: int = flag(16, "answers to a problem of amc; else one", "1..1e6")
    cache: Literal["none", "block"] = flag("none", "block: faster, approximate (igpo.sample)")
    threshold: float | None = flag(None, "faster, approximate, such as 0.9 (igpo.sample)", "0..1")
    rescore: str | None = flag(None, "a samples.jsonl to grade again")
    compare: list[str] | None = flag(None, "folders of finished RL runs, each called NAME-SEED")
    ask: str | None = flag(None, "a question to answer step by step in the terminal")
    speed: bool = flag(False, "time the sampler on random prompts")
    prompt_length: int = flag(64, "prompt length of --speed, tokens", "1..1e6")

# ------------------------------------------------
# 1. Problems.

TASKS = {  # hub name, subset, split; the alternatives in order
    "gsm8k": [("openai/gsm8k", "main", "test")], "math500": [("HuggingFaceH4/MATH-500",)],
    "amc": [("AI-MO/aimo-validation-amc", None, "train"), ("math-ai/amc23",)],
    "minerva": [("math-ai/minervamath",)]}

def read_problems(source, subset=None, split="test"):
    r"""The problems in a file or a hub data set. The reference answer is what follows GSM8K's ####,
    else the last \boxed{}, else column answer as it is."""
    columns, problems = {"problem|question": str, "answer|solution": (str, int, float)}, []
    for row in igpo.read_rows(source, columns, split=split, subset=subset):
        question = row["problem"] if isinstance(row.get("problem"), str) else row["question"]
        answer = row.get("answer")
        if isinstance(answer, float):  # AMC's 36.0; nan is an empty cell
            answer = f"{answer:.15g}".replace("nan", "")
        stated = str(answer).strip() if isinstance(answer, (str, int)) else ""
        text = stated or str(row.get("solution"))
        reference = "\\boxed" in text and igpo.committed_answer(text) or stated
        if "####" in text:
            reference = text.rpartition("####")[2].strip()
        if not question.strip() or not reference:
            raise UsageError(f"{source}, row {len(problems) + 1}: no question, or no answer")
        problems.append(igpo.Problem(question, reference, None))
    return problems

def load_problems(tasks, data, limit):
    """--tasks and --data -> {task: (source, its problems)}"""
    found, given = {}, dict(part.partition("=")[::2] for part in data.split(",") if part)
    for task in [*tasks.split(","), *given]:
        if task not in TASKS:
            raise UsageError(f"no task {task!r}; there are {', '.join(TASKS)}")
    for task in tasks.split(","):
        *others, last = [(given[task],)] if task in given else TASKS[task]
        for source in others:
            with contextlib.suppress(UsageError):
                found[task] = source[0], read_problems(*source)[:limit]
        if task not in found:
            found[task] = last[0], read_problems(*last)[:limit]
    return found

# ------------------------------------------------
# 2. Sampling. Rank 0 writes samples.jsonl, rank r samples.rank_r.jsonl, merged before and after.

SAMPLE = {"task": str, "problem": int, "sample": int, "completion": str, "reference": str,
          "verdict": bool, "length": int}
key = itemgetter("task", "problem", "sample")

def merge_samples(out, keys):
    """All samples of a folder, in the order of their keys, into samples.jsonl."""
    parts, samples = sorted(out.glob("samples*.jsonl")), {}
    for part in parts:
        with contextlib.suppress(UsageError):
            igpo.read_lines(part)  # cuts off half a line, which a kill may leave
        if part.stat().st_size:
            samples |= {key(sample): sample for sample in igpo.read_rows(part, SAMPLE)}
    samples = [samples[k] for k in keys if k in samples]
    igpo.write_file(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    for part in out.glob("samples.rank_*.jsonl"):
        part.unlink()
    return samples

def batches_of(prompts, samples, size, seed):
    """Lists of (problem, sample), each once; prompts of like length share a batch."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    jobs = [(i, s) for i in by_length for s in range(samples)]
    starts = torch.randperm(-(-len(jobs) // size), generator=igpo.seeded(seed)) * size
    return [jobs[at: at + size] for at in starts.tolist()]

def graded(completion, reference):
    """What a sample says of its answer. timed_out: the grader gave up."""
    timeouts, verdict = igpo.GRADE_TIMEOUTS, igpo.grade(completion, reference)
    return {"extracted": igpo.committed_answer(completion), "reference": reference,
            "verdict": verdict, "timed_out": igpo.GRADE_TIMEOUTS > timeouts}

def evaluate(model, tokenizer, found, cfg, out):
    """Sample and grade what the folder lacks, then write results.json and print the results."""
    rank, world, examples, batches, keys = igpo.rank(), igpo.world(), {}, [], []
    for task, (_, problems) in found.items():
        examples[task] = igpo.encode_problems(tokenizer, problems, sys.maxsize)
        prompts = [example.prompt for example in examples[task]]
        samples = cfg.amc_samples if task == "amc" else 1
        batches += [(task, jobs) for jobs in batches_of(prompts, samples, cfg.batch_size, cfg.seed)]
        keys += [(task, i, s) for i in range(len(problems)) for s in range(samples)]
    if rank == 0:
        path, weights = out / "settings.json", 0
        for _, weight in sorted(model.named_parameters()):
            raw = weight.detach().cpu().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
            weights = zlib.crc32(raw.numpy(), weights)
        settings = dataclasses.asdict(cfg) | {
            "data": {task: source for task, (source, _) in found.items()}, "weights": weights,
            "dtype": str(model.dtype), "problems": zlib.crc32(repr(examples).encode())}
        for name in ("out_dir", "rescore", "compare", "ask", "speed", "prompt_length"):
            del settings[name]  # say nothing about the samples
        begun = path.exists() or any(out.glob("samples*.jsonl"))
        with file_errors(path):
            before = json.loads(path.read_text()) if begun else settings
            differ = [f"{name} was {before.get(name)}, now it is {value}"
                      for name, value in settings.items() if before.get(name) != value]
        if differ:
            raise UsageError(f"{out} has samples made with other settings: {'; '.join(differ)}. "
                             "Give another --out_dir, or delete the folder")
        igpo.write_file(path, json.dumps(settings, indent=2))
        print(f"{len(merge_samples(out, keys))} of {len(keys)} samples are in {out} already")
    igpo.barrier()
    done = set(map(key, igpo.read_lines(out / "samples.jsonl")))
    igpo.barrier()  # from here on rank 0 writes to that file

    # A batch that lacks a sample is done again as a whole.
    left = [batch for batch in batches if any((batch[0], *job) not in done for job in batch[1])]
    began, tokens = time.time(), 0
    for task, jobs in tqdm(left[rank::world], "batches", disable=rank > 0):
        for i, s, text, length in igpo.answer_examples(
                model, tokenizer, examples[task], jobs=jobs, batch_size=len(jobs),
                temperature=cfg.amc_temperature if task == "amc" else 0.0,
                seed=(cfg.seed, task), **igpo.sampling(cfg)):
            tokens += length
            if (task, i, s) not in done:
                prompt, reference, _ = examples[task][i]
                igpo.append_line(out / f"samples{f'.rank_{rank}' * (rank > 0)}.jsonl", {
                    "task": task, "problem": i, "sample": s, "prompt": tokenizer.decode(prompt),
                    "completion": text, **graded(text, reference), "length": length})
    speed = {"tokens_per_second": world * tokens / (time.time() - began)}
    speed = igpo.mean_across_ranks(speed, model.device)  # which waits for all
    if rank == 0:
        results = summarise(merge_samples(out, keys))
        packages = ("torch", "transformers", "math-verify")
        igpo.write_file(out / "results.json", json.dumps({
            "results": results, "settings": settings, "processes": world, **speed,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: importlib.metadata.version(name) for name in packages}}, indent=2))
        print_table({task: row | speed for task, row in results.items()})

# ------------------------------------------------
# 3. Results.

def print_table(rows):
    """Print {name: {column: value}} in Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"| {'':17} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        print(f"| {name:17} | {' | '.join(map(str.rjust, cells, map(len, columns)))} |")

def mean_and_error(values):
    """The mean and its standard error, None of a single value."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None

def summarise(samples):
    """-> {task: its results}. Errors are over problems: samples of one are not independent."""
    results = {}
    for task in dict.fromkeys(sample["task"] for sample in samples):
        own, problems = [s for s in samples if s["task"] == task], {}
        for sample in own:
            problems.setdefault(sample["problem"], []).append(sample["verdict"])
        accuracy, error = mean_and_error(list(map(fmean, problems.values())))
        results[task] = {
            "accuracy": accuracy, "standard_error": error, "n": len(problems), "samples": len(own),
            "no_answer": fmean(sample["extracted"] is None for sample in own),
            "length": fmean(sample["length"] for sample in own),
            "grade_timeouts": sum(sample["timed_out"] for sample in own)}
    return results

def rescore(path):
    """Grade a samples file again; print the results and every verdict that changed."""
    samples, changed = igpo.read_rows(path, SAMPLE), []
    for sample in samples:
        before = sample["verdict"]
        sample |= graded(sample["completion"], sample["reference"])
        if sample["verdict"] != before:
            changed.append("{task} problem {problem} sample {sample}: {extracted!r} for "
                           "{reference!r} is now {verdict}".format(**sample))
    print_table(summarise(samples))
    print(f"{len(changed)} of {len(samples)} verdicts changed", *changed, sep="\n")

def compare(folders):
    """Print a table of finished RL runs and two figures that GitHub draws."""
    def mean(lines, name):
        return fmean(line[name] for line in lines)

    groups, rows, steps = {}, {}, None
    figures = {"held-out accuracy": [], "groups all wrong before hints": []}
    for folder in map(Path, folders):
        if not (folder / "summary.json").is_file():
            raise UsageError(f"{folder} holds no finished run (no summary.json)")
        lines, curve = igpo.read_lines(folder / "metrics.jsonl"), {}
        with file_errors(folder / "metrics.jsonl"):
            rl = [line for line in lines if line["stage"] == "rl"]
            for line in lines:
                if line["stage"] == "eval":
                    *_, (name, value) = line.items()
                    curve[len(rl) if name == "accuracy_final" else line["step"]] = value
            steps = steps or sorted(curve)
            if sorted(curve) != steps:
                raise UsageError(f"{folder}: evaluated at other steps than {steps}")
            tenth = max(len(rl) // 10, 1)
            columns = {
                "accuracy before RL": curve[0], "after RL": curve[len(rl)],
                "all wrong, first tenth": mean(rl[:tenth], "all_wrong"),
                "last tenth": mean(rl[-tenth:], "all_wrong"),
                "after hints": mean(rl, "all_wrong_after"), "grad_norm": mean(rl, "grad_norm"),
                "largest": max(x["grad_norm"] for x in rl), "final KL": mean(rl[-tenth:], "kl")}
            windows = [mean(rl[at: to], "all_wrong") for at, to in zip(steps, steps[1:])]
        group = re.sub(r"-\d+$", "", folder.resolve().name)
        groups.setdefault(group, []).append((columns, [curve[step] for step in steps], windows))
    for group, runs in groups.items():
        columns, *curves = zip(*runs)
        rows[group] = {"runs": len(runs)}
        for column in columns[0]:
            known = mean_and_error([run[column] for run in columns])
            rows[group][column] = " ± ".join(f"{x:.3f}" for x in known if x is not None)
        rows[group]["largest"] = max(run["largest"] for run in columns)
        for figure, values in zip(figures.values(), curves):
            figure.append(", ".join(f"{fmean(point):.3f}" for point in zip(*values)))
    print_table(rows)
    for title, figure in figures.items():
        ticks = steps[-figure[0].count(",") - 1:]
        print(f'\n```mermaid\nxychart-beta\n    title "{title}: {", ".join(groups)}"')
        print(f'    x-axis "RL step" {ticks}\n    y-axis "share" 0 --> 1')
        print(*[f"    line [{line}]" for line in figure], "```", sep="\n")

def ask(model, tokenizer, cfg):
    """Show the denoising of an answer: a line a step, in a terminal in place."""
    prompts = torch.tensor([igpo.encode_prompt(tokenizer, cfg.ask)], device=model.device)
    igpo.check_length(model, prompts, cfg.gen_length)
    start, grey, green, normal = "\n", "", "", ""
    if sys.stdout.isatty():
        start, grey, green, normal = "\r\033[2K", "\033[90m", "\033[32m", "\033[0m"

    def show(completions):
        masks = (completions[0] == model.config.mask_token_id).tolist()
        words = [grey + "_" if mask else green + tokenizer.decode(token)
                 for mask, token in zip(masks, completions[0])]
        print(start + " ".join(words).replace("\n", "\\n"), end=normal, flush=True)

    completion = igpo.sample(model, prompts, watch=show, **igpo.sampling(cfg))[0]
    text = igpo.decode(tokenizer, completion, model.config.eos_token_id)
    print(f"\n\n{text}\n\nanswer: {igpo.committed_answer(text)}")

RANDOM = {  # models with random weights, a small one and one of LLaDA's shape
    "random": dict(vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                   num_attention_heads=8),
    "random-8b": dict(vocab_size=126464, hidden_size=4096, intermediate_size=12288,
                      num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096)}

@torch.no_grad()
def time_sampler(model, cfg):
    """Time the sampler's variants, beside as many bare forward passes as the exact one makes
    -> {variant: row}. TFLOP/s are 2 x parameters x tokens a second."""
    B, P, L, K = cfg.batch_size, cfg.prompt_length, cfg.gen_length, cfg.block_length
    prompts = torch.randint(model.config.vocab_size, (B, P), generator=igpo.seeded("speed"))
    igpo.check_length(model, prompts, L)
    canvas = torch.nn.functional.pad(prompts, (0, L), value=model.config.mask_token_id)
    canvas, block = canvas.to(model.device), torch.arange(P, P + K, device=model.device)
    rows, passes, outputs, options = {}, [], {}, igpo.sampling(cfg)
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: passes.append(inputs["input_ids"].numel()), with_kwargs=True)
    for name in ("exact", "bare forwards", "exact", "cache", "threshold", "cache + threshold"):
        options["cache"] = "block" if "cache" in name else None
        options["threshold"] = cfg.threshold or 0.9 if "threshold" in name else None
        passes.clear()
        began, outputs[name] = time.perf_counter(), canvas[:, P:]
        if name == "bare forwards":
            for _ in range(cfg.diffusion_steps):
                igpo.logits_at(model, canvas, None, block)
        else:  # exact twice, to warm up
            outputs[name] = igpo.sample(model, canvas[:, :P], **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rows[name] = {"seconds": seconds, "tokens/s": B * L / seconds, "forwards": len(passes),
                      "TFLOP/s": 2e-12 * model.num_parameters() * sum(passes) / seconds}
    hook.remove()
    for name, row in rows.items():
        row["x bare"] = row["seconds"] / rows["bare forwards"]["seconds"]
        row["as exact"] = (outputs[name] == outputs["exact"]).float().mean().item()
    return rows

# ------------------------------------------------
# 4. The command line.

def main(argv=None):
    cfg = igpo.parse(Config, argv)
    if cfg.rescore:
        return rescore(cfg.rescore)
    if cfg.compare:
        return compare(cfg.compare)
    if not cfg.model:
        raise UsageError("no model: give --model FOLDER_OR_HUB_NAME")
    igpo.blocks_of(cfg.gen_length, cfg.block_length, cfg.diffusion_steps)
    device = igpo.setup()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {} if cfg.speed or cfg.ask else load_problems(cfg.tasks, cfg.data, cfg.limit)
    if cfg.speed and cfg.model in RANDOM:
        config = LlamaConfig(**RANDOM[cfg.model], is_causal=False, mask_token_id=0)
        with torch.device(device):  # nothing is downloaded or copied
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        model, tokenizer = igpo.load_model(cfg.model, dtype=dtype, device=device)
    if cfg.ask:
        ask(model, tokenizer, cfg)
    elif cfg.speed:
        print_table(time_sampler(model, cfg))
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(f"{torch.cuda.get_device_name()}, {memory:.1f} GiB at most")
    else:
        prompts = [igpo.encode_prompt(tokenizer, problem.question)
                   for _, problems in found.values() for problem in problems]
        igpo.check_length(model, prompts, cfg.gen_length)
        name = re.sub(r"[^\w.-]+", "-", cfg.model).strip("-.")
        out = Path(cfg.out_dir or f"runs/eval-{name}")
        names = {path.name for path in out.glob("*")} - {".lock"}
        if names and "settings.json" not in names:
            raise UsageError(f"{out} is not empty and holds no evaluation")
        with igpo.locked(out):
            evaluate(model, tokenizer, found, cfg, out)

if __name__ == "__main__":
    igpo.run_main(main, "eval.py")
