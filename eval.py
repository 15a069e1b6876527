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

import dataclasses
import importlib.metadata
import json
import re
import sys
import time
import zlib
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
    data: str = flag("", "problems from elsewhere: gsm8k=FILE.jsonl,amc=HUB_NAME")
    limit: int | None = flag(None, "first problems of each task", "1..1e9")
    out_dir: str | None = flag(None, "folder for the results; default: runs/eval-MODEL")
    seed: int = flag(0, "seed of everything random", "0..1e9")
    gen_length: int = flag(256, "completion length, tokens")
    diffusion_steps: int = flag(128, "denoising steps for a completion")
    block_length: int = flag(32, "tokens in a semi-autoregressive block")
    batch_size: int = flag(16, "samples in a batch")
    amc_temperature: float = flag(0.1, "of amc; all else is greedy", "0..1e9")
    amc_samples: int = flag(16, "answers to a problem of amc; else one")
    cache: Literal["block"] | None = flag(None, "faster, approximate (igpo.sample)")
    threshold: float | None = flag(None, "faster, approximate; try 0.9 (igpo.sample)", "0..1")
    rescore: str | None = flag(None, "a samples.jsonl to grade again")
    compare: list[str] | None = flag(None, "folders of finished RL runs, each called NAME-SEED")
    ask: str | None = flag(None, "a question to answer step by step")
    speed: bool = flag(False, "time the sampler on random prompts")
    prompt_length: int = flag(64, "prompt length of --speed, tokens")

# ------------------------------------------------
# 1. Problems.

TASKS = {  # hub name, subset, split
    "gsm8k": ("openai/gsm8k", "main"), "math500": ("HuggingFaceH4/MATH-500",),
    "amc": ("AI-MO/aimo-validation-amc", None, "train"), "minerva": ("math-ai/minervamath",)}

def read_problems(source, subset=None, split="test"):
    r"""The problems in a file or a hub data set. The reference is the last \boxed{} of the answer,
    else what follows GSM8K's ####, else all of it; without an answer, the \boxed{} of solution."""
    problems = []
    for number, row in enumerate(igpo.read_rows(source, split=split, subset=subset), 1):
        with file_errors(f"{source}, row {number}"):
            question, stated = row.get("problem") or row.get("question"), row.get("answer")
            if isinstance(stated, float) and abs(stated) >= 2**53:
                raise ValueError("a number with so many digits must be text")
            if isinstance(stated, (int, float)):  # AMC's 36.0; nan is none
                stated = str(stated).removesuffix(".0").replace("nan", "")
            answer = igpo.committed_answer(stated or row.get("solution") or "")
            answer = answer or (stated or "").rpartition("####")[2].strip()
            if not isinstance(question, str) or not question.strip() or not answer:
                raise ValueError(r"needs a text problem, and an answer or a solution with \boxed{}")
            problems.append(igpo.Problem(question, answer, None))
    return problems

def load_problems(tasks, data, limit):
    """--tasks and --data -> {task: its problems}"""
    with file_errors("--data, TASK=SOURCE"):
        given = dict(part.split("=", 1) for part in data.split(",") if part)
    for task in [*tasks.split(","), *given]:
        if task not in TASKS:
            raise UsageError(f"no task {task!r}; there are {', '.join(TASKS)}")
    sources = TASKS | {task: (source,) for task, source in given.items()}
    return {task: read_problems(*sources[task])[:limit] for task in tasks.split(",")}

# ------------------------------------------------
# 2. Sampling. Rank 0 appends to samples.jsonl, rank r to samples.rank_r.jsonl; merged at the end.

def read_samples(out):
    """{key: sample} of all that any processes left in the folder"""
    samples = {}
    for path in out.glob("samples*.jsonl"):
        with file_errors(path):
            samples |= {(s["task"], s["problem"], s["sample"]): s for s in igpo.read_lines(path)}
    return samples

def batches_of(prompts, samples, size, seed):
    """Lists of (problem, sample), each once; prompts of like length share a batch."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    jobs = [(i, s) for i in by_length for s in range(samples)]
    batches = [jobs[at: at + size] for at in range(0, len(jobs), size)]
    return [batches[b] for b in torch.randperm(len(batches), generator=igpo.seeded(seed))]

def graded(completion, reference):
    """What a sample says of its answer. timed_out: the grader gave up."""
    timeouts, verdict = igpo.GRADE_TIMEOUTS, igpo.grade(completion, reference)
    return {"extracted": igpo.committed_answer(completion), "reference": reference,
            "verdict": verdict, "timed_out": igpo.GRADE_TIMEOUTS > timeouts}

def check_folder(out, settings):
    """A folder is for samples of one setting, and for nothing else."""
    with file_errors(f"{out} holds no evaluation; give another --out_dir"):
        begun = any(out.glob("[!.]*"))
        before = json.loads((out / "settings.json").read_text()) if begun else settings
        differ = [f"{name} was {before.get(name)}, now it is {value}"
                  for name, value in settings.items() if before.get(name) != value]
    if differ:
        raise UsageError(f"{out} has samples made with other settings ({', '.join(differ)}): give "
                         "another --out_dir")

def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

def answer(model, tokenizer, prompts, jobs, seed, **sampling):
    """Sample one answer for each (problem, sample) of jobs -> their texts and lengths in tokens."""
    ends = model.config.eos_token_id
    ids, mask = igpo.prompt_batch(model, [prompts[i] for i, _ in jobs])
    generators = [igpo.seeded(seed, "answer", i, s) for i, s in jobs]
    completions = igpo.sample(model, ids, prompt_mask=mask, stop_early=True, generator=generators,
                              **sampling)
    return [(igpo.decode(tokenizer, completion, ends),
             igpo.counted_tokens(completion, ends).sum().item()) for completion in completions]

def evaluate(model, tokenizer, found, cfg, out):
    """Sample and grade what the folder lacks, then write results.json and print the results."""
    rank, world, prompts, batches, keys = igpo.rank(), igpo.world(), {}, [], []
    for task, problems in found.items():
        prompts[task] = igpo.encode_prompts(tokenizer, [p.question for p in problems])
        igpo.check_length(model, max(map(len, prompts[task])), cfg.gen_length)
        samples = cfg.amc_samples if task == "amc" else 1
        batches += [(task, jobs) for jobs in
                    batches_of(prompts[task], samples, cfg.batch_size, cfg.seed)]
        keys += [(task, i, s) for i in range(len(problems)) for s in range(samples)]
    weights = [zlib.crc32(weight.cpu().reshape(-1).view(torch.uint8).numpy())
               for weight in model.state_dict().values()]  # as bytes: numpy has no bfloat16
    settings = dataclasses.asdict(cfg) | {
        "out_dir": None, "problems": zlib.crc32(repr((prompts, found)).encode()),
        "weights": zlib.crc32(repr(weights).encode())}
    check_folder(out, settings)  # before anything is written
    igpo.barrier()
    if rank == 0:
        igpo.lock(out)
        igpo.write_file(out / "settings.json", json.dumps(settings, indent=2))
    igpo.barrier()
    done = read_samples(out)
    igpo.barrier()  # all have read before one writes
    path = out / (f"samples.rank_{rank}.jsonl" if rank else "samples.jsonl")
    igpo.print0(f"{len(done)} of {len(keys)} samples are in {out} already")
    # A batch that lacks a sample is done again as a whole.
    left = [(task, jobs) for task, jobs in batches if any((task, *j) not in done for j in jobs)]
    began, tokens = time.time(), 0
    for task, jobs in tqdm(left[rank::world], "batches", disable=rank > 0):
        answers = answer(model, tokenizer, prompts[task], jobs, (cfg.seed, task),
                         temperature=cfg.amc_temperature if task == "amc" else 0.0,
                         **igpo.sampling(cfg))
        for (i, s), (text, length) in zip(jobs, answers):
            tokens += length
            if (task, i, s) not in done:
                igpo.append_line(path, {
                    "task": task, "problem": i, "sample": s, "completion": text, "length": length,
                    "prompt": tokenizer.decode(prompts[task][i]),
                    **graded(text, found[task][i].answer)})
    speed = {"tokens_per_second": world * tokens / (time.time() - began)}
    speed = igpo.mean_across_ranks(speed)  # which waits for all
    if rank == 0:
        done = read_samples(out)
        samples = [done[k] for k in keys]
        igpo.write_file(path, "".join(json.dumps(sample) + "\n" for sample in samples))
        for part in out.glob("samples.rank_*.jsonl"):
            part.unlink()
        results = summarise(samples)
        igpo.write_file(out / "results.json", json.dumps({
            "results": results, "settings": settings, "processes": world, **speed,
            "device": device_name(), "versions": {name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "math-verify")}}, indent=2))
        print_table({task: row | speed for task, row in results.items()})

# ------------------------------------------------
# 3. Results.

def print_table(rows):
    """Print {name: {column: value}} in Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"| {'':17} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        cells = [f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()]
        print(f"| {name:17} | {' | '.join(map(str.rjust, cells, map(len, columns)))} |")

def mean(lines, name):
    return fmean(line[name] for line in lines)

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
        accuracy, error = mean_and_error([fmean(verdicts) for verdicts in problems.values()])
        results[task] = {
            "accuracy": accuracy, "standard_error": error, "n": len(problems), "samples": len(own),
            "no_answer": fmean(s["extracted"] is None for s in own), "length": mean(own, "length"),
            "grade_timeouts": sum(s["timed_out"] for s in own)}
    return results

def rescore(path):
    """Grade a samples file again; print every verdict that changed, and the results."""
    samples, changed = igpo.read_rows(path, ["task", "completion", "reference"]), 0
    with file_errors(path):
        for sample in samples:
            before = sample["verdict"]
            sample |= graded(sample["completion"], sample["reference"])
            if sample["verdict"] != before:
                changed += 1
                print("{task} problem {problem} sample {sample}: {extracted!r} for {reference!r} "
                      "is now {verdict}".format(**sample))
        print_table(summarise(samples))
    print(f"{changed} of {len(samples)} verdicts changed")

def read_run(folder):
    """A finished RL run -> table row, steps evaluated at, accuracy there, all-wrong in between"""
    if not (folder / "summary.json").is_file():
        raise UsageError(f"{folder} holds no finished run (no summary.json)")
    with file_errors(folder):
        lines, accuracy = igpo.read_lines(folder / "metrics.jsonl"), {}
        rl = [line for line in lines if line["stage"] == "rl"]
        for line in lines:
            if line["stage"] == "eval":
                name, value = list(line.items())[-1]
                accuracy[len(rl) if name == "accuracy_final" else line["step"]] = value
        steps, tenth = list(accuracy), max(len(rl) // 10, 1)
        first, last = rl[:tenth], rl[-tenth:]
        row = {"accuracy before RL": accuracy[0], "after RL": accuracy[len(rl)],
               "all wrong, first tenth": mean(first, "all_wrong"),
               "last tenth": mean(last, "all_wrong"), "after hints": mean(rl, "all_wrong_after"),
               "grad_norm": mean(rl, "grad_norm"), "final KL": mean(last, "kl")}
        all_wrong = [mean(rl[at: to], "all_wrong") for at, to in zip(steps, steps[1:])]
    return row, steps, list(accuracy.values()), all_wrong

def compare(folders):
    """Print a table of finished RL runs, grouped by name, and two figures that GitHub draws."""
    groups, rows = {}, {}
    for folder in map(Path, folders):
        groups.setdefault(re.sub(r"-\d+$", "", folder.resolve().name), []).append(read_run(folder))
    steps = [run[1] for runs in groups.values() for run in runs]
    if steps.count(steps[0]) < len(steps):
        raise UsageError("runs evaluated at different steps do not compare")
    for group, runs in groups.items():
        rows[group] = {"runs": len(runs)}
        for column in runs[0][0]:
            known = mean_and_error([run[0][column] for run in runs])
            rows[group][column] = " ± ".join(f"{x:.3f}" for x in known if x is not None)
    print_table(rows)
    figures = (2, "held-out accuracy", steps[0]), (3, "groups all wrong before hints", steps[0][1:])
    for curve, title, ticks in figures:
        print(f'\n```mermaid\nxychart-beta\n    title "{title}: {", ".join(groups)}"')
        print(f'    x-axis "RL step" {ticks}\n    y-axis "share" 0 --> 1')
        for runs in groups.values():
            print("    line", [round(fmean(x), 3) for x in zip(*[run[curve] for run in runs])])
        print("```")

def ask(model, tokenizer, cfg):
    """Show the denoising of an answer: a line a step, in a terminal in place."""
    prompts = torch.tensor(igpo.encode_prompts(tokenizer, [cfg.ask]), device=model.device)
    igpo.check_length(model, prompts.shape[1], cfg.gen_length)
    start = "\033[2J\033[H" if sys.stdout.isatty() else ""  # clears the screen
    mask = tokenizer.decode(model.config.mask_token_id)

    def show(completions):
        text = tokenizer.decode(completions[0]).replace(mask, "_")
        print(start + text.replace("\n", "\\n"), flush=True)

    completion = igpo.sample(model, prompts, watch=show, **igpo.sampling(cfg))[0]
    text = igpo.decode(tokenizer, completion, model.config.eos_token_id)
    print(f"\n{text}\n\nanswer: {igpo.committed_answer(text)}")

RANDOM = {  # models with random weights; the second is LLaDA-8B, else shaped as Llama-7B
    "random": dict(vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                   num_attention_heads=8),
    "random-8b": dict(vocab_size=126464, intermediate_size=12288)}

@torch.no_grad()
def time_sampler(model, cfg):
    """Time the sampler's variants, and as many bare forward passes as the exact one makes."""
    (B, P, L), rows, outputs = (cfg.batch_size, cfg.prompt_length, cfg.gen_length), {}, {}
    prompts = torch.randint(model.config.vocab_size, (B, P), device=model.device)
    igpo.check_length(model, P, L)
    canvas = torch.nn.functional.pad(prompts, (0, L), value=model.config.mask_token_id)
    block = torch.arange(P, P + cfg.block_length, device=model.device)
    for name in ("exact", "bare forwards", "exact", "cache", "threshold", "cache + threshold"):
        options = igpo.sampling(cfg) | {
            "cache": "block" if "cache" in name else None,
            "threshold": (cfg.threshold or 0.9) if "threshold" in name else None}
        outputs[name], passes, began = canvas[:, P:], [], time.perf_counter()
        if name == "bare forwards":
            passes = range(cfg.diffusion_steps)
            for _ in passes:
                igpo.logits_at(model, canvas, None, block)
        else:  # exact twice, to warm up
            outputs[name] = igpo.sample(model, prompts, watch=passes.append, **options)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rows[name] = {"seconds": seconds, "tokens/s": B * L / seconds, "forwards": len(passes)}
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
    found = {} if cfg.speed or cfg.ask else load_problems(cfg.tasks, cfg.data, cfg.limit)
    dtype = igpo.compute_dtype(device)
    torch.manual_seed(cfg.seed)
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
            print(f"{device_name()}, {memory:.1f} GiB at most")
    else:
        name = re.sub(r"[^\w.-]+", "-", cfg.model).strip("-.")
        evaluate(model, tokenizer, found, cfg, Path(cfg.out_dir or f"runs/eval-{name}"))

if __name__ == "__main__":
    igpo.run_main(main, "eval.py")
