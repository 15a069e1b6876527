r"""Accuracy of a masked diffusion LM on GSM8K, MATH500, AMC and Minerva, by igpo.py's sampler,
prompt and grader.

    python eval.py --model GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k,math500,amc,minerva
    torchrun --nproc_per_node=8 eval.py --model runs/RUN/final     the same results, on 8 GPUs
    python eval.py --model FOLDER --tasks math500 --data math500=math500.jsonl --limit 20    offline
    python eval.py --rescore runs/eval-NAME/samples.jsonl        grade again what is stored
    python eval.py --ask "What is 2 + 3?" --model FOLDER         one answer, denoised step by step
    python eval.py --speed --model random-8b                     what the sampler costs here
    python eval.py --compare runs/proof/*                       table and curves of finished runs

The protocol is the paper's: one greedy answer a problem; for AMC the mean of 16 at temperature 0.1.
--out_dir (default runs/eval-MODEL; all processes must see it) holds samples.jsonl, a line a sample,
written as it goes; results.json; and settings.json. A killed evaluation goes on with the same
command. Neither that nor the number of processes changes a sample: its random numbers depend on
(seed, task, problem, sample) alone, and which samples share a batch, on the settings alone.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import igpo
from igpo import Example, UsageError, barrier, committed_answer, encode_prompt, flag, grade
from igpo import load_model, mean_across_ranks, print0, rank, read_lines, read_rows, seeded, world

TASKS = {  # where the problems are on the hub: (name, subset, split), the alternatives in order
    "gsm8k": [("openai/gsm8k", "main", "test")],
    "math500": [("HuggingFaceH4/MATH-500", None, "test")],
    "amc": [("AI-MO/aimo-validation-amc", None, "train"), ("math-ai/amc23", None, "test")],
    "minerva": [("math-ai/minervamath", None, "test")],
}

@dataclass
class Config:
    """Every setting, every one a flag."""
    model: str | None = flag(None, "folder or hub name; --speed also takes random and random-8b")
    tasks: str = flag("gsm8k,math500,amc,minerva", "what to measure, separated by commas")
    data: str = flag("", "other sources, as gsm8k=FILE.jsonl,amc=FILE.jsonl; default: the hub")
    limit: int | None = flag(None, "use the first problems of each task only", "1..1e9")
    out_dir: str | None = flag(None, "folder for the results; default: runs/eval-MODEL")
    rescore: str | None = flag(None, "a samples.jsonl to grade again")
    ask: str | None = flag(None, "a question, whose answer is shown as it is denoised")
    speed: bool = flag(False, "time the sampler's variants")
    compare: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "folders of finished RL runs, NAME-SEED each"})
    seed: int = flag(0, "seed of everything random", "0..1e9")
    dtype: Literal["auto", "bfloat16", "float32"] = flag("auto", "auto: bfloat16 on a GPU")
    gen_length: int = flag(256, "completion length, tokens", "1..1e5")
    diffusion_steps: int = flag(128, "denoising steps for a completion", "1..1e5")
    block_length: int = flag(32, "tokens in a semi-autoregressive block", "1..1e5")
    batch_size: int = flag(16, "samples in one batch", "1..1e5")
    prompt_length: int = flag(64, "prompt tokens of --speed", "1..1e5")
    temperature: float = flag(0.0, "of gsm8k, math500 and minerva; 0 is greedy", "0..100")
    samples: int = flag(1, "answers to a problem of these", "1..1e5")
    amc_temperature: float = flag(0.1, "of amc", "0..100")
    amc_samples: int = flag(16, "answers to a problem of amc", "1..1e5")
    cache: Literal["none", "block"] = flag("none", "block: faster, approximate")
    threshold: float | None = flag(None, "faster, approximate; try 0.9", "0..1")

# ------------------------------------------------
# Problems

def reference_answer(row):
    r"""The final answer of a row: what follows GSM8K's ####, else the last \boxed{}, else column
    answer as it is; numbers (AMC's) without a trailing .0."""
    answer = row.get("answer")
    text = row.get("solution") if answer in (None, "") else answer
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    text = str(text)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = committed_answer(text) if "\\boxed" in text else None
    return boxed or ("" if answer in (None, "") else text.strip())

def read_problems(source, subset=None, split="test", limit=None):
    """(question, reference answer) pairs of a local file or a hub data set."""
    columns = {"problem|question": str, "answer|solution": (str, int, float)}
    problems = []
    for number, row in enumerate(read_rows(source, columns, split=split, subset=subset)[:limit], 1):
        reference = reference_answer(row)
        if not reference:
            raise UsageError(f"{source}, row {number}: no answer, and no #### or \\boxed{{}}")
        problems.append((row.get("problem") or row.get("question"), reference))
    return problems

def task_problems(cfg):
    """-> {task: (source, problems)}, from --data or else the first hub data set that can be had"""
    names = list(dict.fromkeys(re.findall(r"[^,\s]+", cfg.tasks)))
    files = dict(part.strip().partition("=")[::2] for part in cfg.data.split(",") if part.strip())
    for name in names + list(files) or [""]:
        if name not in TASKS or files.get(name) == "":
            raise UsageError(f"no task {name!r} or no file for it; there are {', '.join(TASKS)}")
    found = {}
    for name in names:
        problem = None
        for source in [(files[name], None, "train")] if name in files else TASKS[name]:
            try:
                found[name] = source[0], read_problems(*source, cfg.limit)
                break
            except UsageError as error:
                problem = error
        if name not in found:
            raise UsageError(f"{problem} (--data {name}=FILE takes a file)")
    return found

# ------------------------------------------------
# Sampling. Rank 0 writes samples.jsonl, rank r its own samples.rank_r.jsonl, until they are merged.

COLUMNS = {"task": str, "problem": int, "sample": int, "completion": str, "reference": str,
           "verdict": bool, "length": int}

def key(sample):
    return sample["task"], sample["problem"], sample["sample"]

def merge_samples(out, tasks):
    """All samples in the folder, sorted, moved to samples.jsonl; a kill loses nothing."""
    parts = sorted(out.glob("samples*.jsonl"))
    samples = {key(sample): sample for path in parts for sample in read_lines(path)}
    samples = sorted(samples.values(), key=lambda s: (tasks.index(s["task"]), *key(s)[1:]))
    igpo.write_file(out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    for path in parts:
        if path.name != "samples.jsonl":
            path.unlink()
    return samples

def check_settings(out, settings):
    """An error where the samples in a folder were made with other settings, data or weights."""
    path = out / "settings.json"
    if path.exists():
        with igpo.file_errors(path):
            before = json.loads(path.read_text())
            for name, value in json.loads(json.dumps(settings)).items():
                if before[name] != value:
                    raise UsageError(f"{out} has samples made with {name} {before[name]}, not "
                                     f"{value}; give another --out_dir, or delete the folder")
    with igpo.file_errors(out):
        if not path.exists() and out.exists() and set(os.listdir(out)) - {".lock"}:
            raise UsageError(f"{out} is not empty and holds no evaluation; give another --out_dir")

def checksum(model):
    """Of the weights, so that a checkpoint trained further is not taken for the one before."""
    crc = 0
    for parameter in model.parameters():
        crc = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return crc

def batches_of(prompts, samples, batch_size, seed):
    """Lists of (problem, sample), together all samples of a task. Prompts of like length share a
    batch, for little padding; the order of batches is random, so that from the start the running
    accuracy and the time left are typical."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    jobs = [(i, s) for i in by_length for s in range(samples)]
    batches = [jobs[at: at + batch_size] for at in range(0, len(jobs), batch_size)]
    random.Random(seed).shuffle(batches)
    return batches

def graded(completion, reference):
    """The fields of a sample that the grader is responsible for."""
    timeouts = igpo.GRADE_TIMEOUTS
    return {"extracted": committed_answer(completion), "reference": reference,
            "verdict": grade(completion, reference), "timed_out": igpo.GRADE_TIMEOUTS > timeouts}

def sample_batches(model, tokenizer, examples, batches, done, path, seed, sampling):
    """Answer and grade this process's share of the batches, a line a sample appended to `path`.
    -> {task: (tokens, seconds)}. examples, sampling: by task. done: the samples that are stored;
    of a batch that lacks some, all are done again, because rows share a batch."""
    finished, verdicts = {key(sample) for sample in done}, defaultdict(list)
    for sample in done:
        verdicts[sample["task"]].append(sample["verdict"])
    left = [(task, jobs) for task, jobs in batches if any((task, *j) not in finished for j in jobs)]
    mine, speed = left[rank():: world()], {task: (0, 0.0) for task in examples}
    with tqdm(total=sum(len(jobs) for _, jobs in mine), unit=" samples", mininterval=1,
              smoothing=0, disable=rank() > 0) as bar:
        for task, jobs in mine:
            began = time.time()
            answers = list(igpo.answer_examples(model, tokenizer, examples[task], jobs=jobs,
                                                batch_size=len(jobs), seed=(seed, task),
                                                **sampling[task]))
            tokens, seconds = speed[task]
            speed[task] = tokens + sum(a[3] for a in answers), seconds + time.time() - began
            for i, s, completion, length in answers:
                example = examples[task][i]
                sample = {"task": task, "problem": i, "sample": s,
                          "prompt": tokenizer.decode(example.prompt), "completion": completion,
                          **graded(completion, example.answer), "length": length}
                if key(sample) not in finished:
                    igpo.append_line(path, sample)
                    verdicts[task].append(sample["verdict"])
            bar.set_description(f"{task}, accuracy {statistics.mean(verdicts[task]):.3f}", False)
            bar.update(len(jobs))
    return speed

def evaluate(cfg, device):
    """Sample what is not in the folder yet, then write and print the results."""
    found = task_problems(cfg)
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(cfg.dtype, cfg.dtype)
    settings = dataclasses.asdict(cfg) | {
        "dtype": dtype, "sources": {task: source for task, (source, _) in found.items()},
        "problems_checksum": zlib.crc32(repr(found).encode())}
    # What says nothing of the samples.
    for name in ("out_dir", "rescore", "ask", "speed", "prompt_length", "compare"):
        del settings[name]
    out = Path(cfg.out_dir or "runs/eval-" + re.sub(r"[^\w.-]+", "-", cfg.model).strip("-."))
    # Each process has the whole model: nobody has to wait for anybody.
    model, tokenizer = load_model(cfg.model, dtype=getattr(torch, dtype), device=device)
    examples = {task: [Example(encode_prompt(tokenizer, q), answer, None) for q, answer in problems]
                for task, (_, problems) in found.items()}
    prompts = {task: [e.prompt for e in examples[task]] for task in examples}
    igpo.check_length(model, sum(prompts.values(), []), cfg.gen_length)
    settings |= {"weights_checksum": checksum(model),
                 "prompts_checksum": zlib.crc32(repr(prompts).encode())}
    check_settings(out, settings)
    barrier()  # every rank has looked before one writes
    with igpo.locked(out):
        if rank() == 0:
            igpo.write_file(out / "settings.json", json.dumps(settings, indent=2))
            merge_samples(out, list(TASKS))
        barrier()
        done = read_lines(out / "samples.jsonl")
        barrier()  # from here on rank 0 appends to that file
        batches, sampling = [], {}
        for task in found:
            samples, temperature = cfg.samples, cfg.temperature
            if task == "amc":
                samples, temperature = cfg.amc_samples, cfg.amc_temperature
            sampling[task] = igpo.sampling(cfg) | {"temperature": temperature}
            batches += [(task, jobs) for jobs in
                        batches_of(prompts[task], samples, cfg.batch_size, cfg.seed)]
        total = sum(len(jobs) for _, jobs in batches)
        print0(f"{cfg.model} on {world()} x {device.type}: {len(done)} of {total} samples exist")
        path = out / ("samples.jsonl" if rank() == 0 else f"samples.rank_{rank()}.jsonl")
        speed = sample_batches(model, tokenizer, examples, batches, done, path, cfg.seed, sampling)
        tokens = mean_across_ranks({task: t for task, (t, _) in speed.items()}, device)
        seconds = mean_across_ranks({task: s for task, (_, s) in speed.items()}, device)
        barrier()
        if rank() == 0:
            stored, results = merge_samples(out, list(TASKS)), {}
            if len(stored) != total:
                raise UsageError(f"{out} lacks {total - len(stored)} samples; start it again")
            for task in found:
                results[task] = summarise([s for s in stored if s["task"] == task])
                rate = world() * tokens[task] / seconds[task] if seconds[task] else None
                results[task]["tokens_per_second"] = rate
            igpo.write_file(out / "results.json", json.dumps(
                {"results": results, "settings": settings, **environment()}, indent=2))
            print(f"{table(results)}\nsamples.jsonl and results.json are in {out}")
        barrier()

# ------------------------------------------------
# Results

def summarise(samples):
    """Samples of one task -> its results. The standard error is over problems, because several
    samples of one problem are not independent."""
    by_problem = defaultdict(list)
    for sample in samples:
        by_problem[sample["problem"]].append(sample["verdict"])
    means = [statistics.mean(map(float, verdicts)) for verdicts in by_problem.values()]
    return {
        "accuracy": statistics.mean(means),
        "standard_error": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        "n": len(means), "samples": len(samples),
        "completion_length": statistics.mean(sample["length"] for sample in samples),
        "no_answer": statistics.mean(sample["extracted"] is None for sample in samples),
        "grade_timeouts": sum(sample["timed_out"] for sample in samples)}

def table(results):
    lines = ["task       accuracy %   std. error       n  samples  no answer %   length  tokens/s"]
    for task, r in results.items():
        error = "-" if r["standard_error"] is None else f"{100 * r['standard_error']:.2f}"
        speed = f"{r['tokens_per_second']:.0f}" if r.get("tokens_per_second") else "-"
        lines.append(f"{task:10} {100 * r['accuracy']:10.2f} {error:>12} {r['n']:7} "
                     f"{r['samples']:8} {100 * r['no_answer']:12.1f} "
                     f"{r['completion_length']:8.1f} {speed:>9}")
    if timeouts := sum(r["grade_timeouts"] for r in results.values()):
        lines.append(f"{timeouts} answers could not be graded in time and count as wrong")
    return "\n".join(lines)

def environment():
    """Versions and hardware, for results.json."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "datasets", "math-verify"):
        found = importlib.metadata.distributions(name=name)
        versions[name] = next((package.version for package in found), None)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": versions, "hardware": {"processes": world(), "gpu": gpu,
                                               "cpu": platform.machine(), "cores": os.cpu_count()}}

def rescore(path):
    """Grade the completions of a samples file again: the results, and which verdicts changed."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no samples file at {path}")
    samples, changed, by_task = read_rows(path, COLUMNS), [], defaultdict(list)
    for sample in tqdm(samples, desc="grading", mininterval=1):
        before = sample["verdict"]
        sample |= graded(sample["completion"], sample["reference"])
        by_task[sample["task"]].append(sample)
        if sample["verdict"] != before:
            changed.append(f"  {sample['task']} problem {sample['problem']} sample "
                           f"{sample['sample']}: "
                           f"{'right -> wrong' if before else 'wrong -> right'}, "
                           f"{sample['extracted']!r} for {sample['reference']!r}")
    print(table({task: summarise(some) for task, some in by_task.items()}))
    print("\n".join([f"{len(changed)} of {len(samples)} verdicts changed", *changed]))

# ------------------------------------------------
# --ask, --speed, --compare

def ask(cfg, device):
    """One answer as it is denoised: masks grey, tokens green, in place where this is a terminal."""
    model, tokenizer = load_model(cfg.model, device=device)
    prompt = torch.tensor([encode_prompt(tokenizer, cfg.ask)], device=device)
    tty = sys.stdout.isatty()
    igpo.check_length(model, prompt.tolist(), cfg.gen_length)

    def paint(completions):
        words = []
        for token in completions[0].tolist():
            masked = token == model.config.mask_token_id
            word = "_" if masked else tokenizer.decode([token]).replace("\n", "\\n")
            words.append(f"\033[{90 if masked else 32}m{word}\033[0m" if tty else word)
        print(("\033[H\033[2J" if tty else "") + " ".join(words), flush=True)

    answer = igpo.sample(model, prompt, temperature=cfg.temperature, watch=paint,
                         generator=seeded(cfg.seed), **igpo.sampling(cfg))[0]
    text = igpo.decode(tokenizer, answer, model.config.eos_token_id)
    print(f"\n{text}\n\nanswer: {committed_answer(text)}")

SHAPES = {  # of random models, made on the device itself
    "random": dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                   num_attention_heads=8, vocab_size=8192),
    "random-8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32,
                      num_attention_heads=32, vocab_size=126464, max_position_embeddings=4096)}

def random_model(shape, device, dtype):
    V = shape["vocab_size"]
    config = LlamaConfig(**shape, is_causal=False, mask_token_id=V - 1, bos_token_id=None,
                         eos_token_id=[V - 2], pad_token_id=V - 2)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()

@torch.no_grad()
def speed_table(model, cfg):
    """Time the sampler's variants -> a list of dicts, the bare forward passes that it contains
    first. TFLOP/s are 2 x parameters x tokens through the model / seconds; on random weights the
    share of tokens equal to the exact sampler's says little, and a threshold is never reached."""
    L, K, config, device = cfg.gen_length, cfg.block_length, model.config, model.device
    prompts = torch.randint(0, config.vocab_size - 2, (cfg.batch_size, cfg.prompt_length),
                            generator=seeded("speed")).to(device)
    canvas = F.pad(prompts, (0, L), value=config.mask_token_id)

    def bare():
        for step in range(cfg.diffusion_steps):
            start = cfg.prompt_length + step * (L // K) // cfg.diffusion_steps * K
            igpo.logits_at(model, canvas, None, torch.arange(start, start + K, device=device))

    def sampler(**options):
        return lambda: igpo.sample(model, prompts, gen_length=L, block_length=K,
                                   steps=cfg.diffusion_steps, temperature=cfg.temperature,
                                   generator=seeded("speed"), **options)

    variants = {"bare forwards": bare, "exact": sampler(), "cache": sampler(cache="block"),
                "threshold": sampler(threshold=0.9),
                "cache + threshold": sampler(cache="block", threshold=0.9)}
    passes, rows, exact = [], [], None
    hook = model.register_forward_pre_hook(with_kwargs=True, hook=lambda model, args, kwargs:
                                           passes.append(kwargs["input_ids"].numel()))
    variants["cache"]()  # warm up
    for name, run in variants.items():
        passes.clear()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        exact = out if name == "exact" else exact
        rows.append({
            "variant": name, "seconds": seconds, "tokens/s": cfg.batch_size * L / seconds,
            "forwards": len(passes), "x bare": seconds / (rows[0]["seconds"] if rows else seconds),
            "TFLOP/s": 2e-12 * model.num_parameters() * sum(passes) / seconds,
            "equal": "" if out is None else (out == exact).float().mean().item()})
    hook.remove()
    return rows

def speed(cfg, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if cfg.model in SHAPES:
        model = random_model(SHAPES[cfg.model], device, dtype)
    else:
        model, _ = load_model(cfg.model, dtype=dtype, device=device)
    rows = speed_table(model, cfg)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()]
        print(f"| {' | '.join(cells)} |")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{torch.cuda.get_device_name()}, {peak:.1f} GiB")

def mean_error(values):
    """Mean ± standard error over runs."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"

def accuracy_curve(lines):
    """{step: held-out accuracy} of one run."""
    curve, steps = {}, max(line["step"] for line in lines)
    for line in lines:
        if line["stage"] == "eval":
            at = {"accuracy_start": 0, "accuracy_sft": 0, "accuracy_final": steps}
            curve |= {at.get(name, line["step"]): line[name] for name in line if "accuracy" in name}
    return dict(sorted(curve.items()))

def compare(folders):
    """A table and curves, as Markdown, of finished runs; NAME-SEED are the runs of NAME."""
    groups = defaultdict(list)
    for folder in folders:
        lines = read_lines(Path(folder) / "metrics.jsonl")
        if not (Path(folder) / "summary.json").is_file() or not any("kl" in line for line in lines):
            raise UsageError(f"{folder} holds no finished RL run")
        groups[re.sub(r"-\d+$", "", Path(folder).name)].append(lines)
    print("| | runs | before RL | final | all wrong, first tenth | last tenth | after hints | "
          "gradient norm | its maximum | KL, last tenth |\n|" + "---|" * 10)
    accuracy, all_wrong = {}, {}
    for name, runs in groups.items():
        rl = [[line for line in run if line["stage"] == "rl"] for run in runs]
        curves = [accuracy_curve(run) for run in runs]
        tenth = max(len(rl[0]) // 10, 1)

        def mean(key, part):
            return mean_error([statistics.mean(line[key] for line in run[part]) for run in rl])

        cells = [mean_error([list(curve.values())[i] for curve in curves]) for i in (0, -1)]
        cells += [mean("all_wrong", slice(tenth)), mean("all_wrong", slice(-tenth, None)),
                  mean("all_wrong_after", slice(None)), mean("grad_norm", slice(None)),
                  f"{max(line['grad_norm'] for run in rl for line in run):.1f}",
                  mean("kl", slice(-tenth, None))]
        print(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
        if len({tuple(curve) for curve in curves}) > 1:
            raise UsageError(f"the runs of {name} were not evaluated at the same steps")
        accuracy[name] = {at: statistics.mean(c[at] for c in curves) for at in curves[0]}
        all_wrong[name] = {at: statistics.mean(line["all_wrong"] for run in rl
                                               for line in run[at: at + tenth])
                           for at in range(0, len(rl[0]), tenth)}
    for title, curves in ("held-out accuracy", accuracy), ("all-wrong groups", all_wrong):
        first = next(iter(curves.values()))
        print(f'\n```mermaid\nxychart-beta\n    title "{title}: {", ".join(curves)}"\n'
              f'    x-axis "RL step" [{", ".join(map(str, first))}]\n    y-axis "share" 0 --> 1')
        for curve in curves.values():
            print(f"    line [{', '.join(f'{value:.2f}' for value in curve.values())}]")
        print("```")

def main(argv=None):
    cfg = igpo.parse(Config, argv)
    if cfg.rescore:
        return rescore(cfg.rescore)
    if cfg.compare:
        return compare(cfg.compare)
    if cfg.model is None:
        raise UsageError("no model; give --model FOLDER_OR_HUB_NAME, or --rescore SAMPLES.jsonl")
    igpo.blocks_of(cfg.gen_length, cfg.block_length, cfg.diffusion_steps)
    device = igpo.setup()
    (ask if cfg.ask else speed if cfg.speed else evaluate)(cfg, device)

if __name__ == "__main__":
    igpo.run_main(main, "eval.py")
