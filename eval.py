"""Accuracy of masked diffusion LMs on GSM8K, MATH500, AMC and Minerva.

    python eval.py --model GSAI-ML/LLaDA-8B-Instruct             torchrun: the same on many GPUs
    python eval.py --model FOLDER --tasks math500 --data math500=FILE.jsonl --limit 20
    python eval.py --rescore runs/eval-NAME                      grade again, without a model
    python eval.py --compare runs/igpo-* runs/grpo-*             finished RL runs side by side
    python eval.py --ask "What is 7 times 8?" --model FOLDER     watch an answer being denoised
    python eval.py --speed --model random                        time the sampler's variants

The protocol is the paper's: one greedy answer to a problem, but for AMC the mean over 16 answers at
temperature 0.1 (avg@16). An evaluation that was killed goes on with the same command, on any number
of processes, and ends with the same samples.

A folder of results holds
    settings.json    what the samples depend on: flags, problems, weights
    samples.jsonl    a line for each answer: its text, what was extracted from it, and the verdict
    results.json     accuracy of each task, and what was left out
"""

import json
import re
import sys
import time
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, chain
from pathlib import Path
from statistics import StatisticsError, fmean, stdev
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import igpo
from igpo import UsageError, flag, rank, user_errors, world

@dataclass
class Config:
    """Every setting, and each is a flag."""
    model: str | None = flag(None, "folder or hub name; for --speed also random or random-8b")
    tasks: str = flag("gsm8k,math500,amc,minerva", "what to measure")
    data: str = flag("", "problems from elsewhere: gsm8k=FILE.jsonl,amc=HUB_NAME")
    limit: int | None = flag(None, "take the first problems of each task alone", "1..1e9")
    out_dir: str | None = flag(None, "folder for the results; default: runs/eval-MODEL")
    seed: int = flag(0, "seed of everything random", "0..1e9")
    # sampler
    gen_length: int = flag(256, "completion length, tokens")
    diffusion_steps: int = flag(128, "denoising steps for a completion")
    block_length: int = flag(32, "tokens in a block")
    batch_size: int = flag(16, "answers sampled at once")
    amc_temperature: float = flag(0.1, "temperature for amc; all else is greedy", "0..1e9")
    amc_samples: int = flag(16, "answers to a problem of amc; all else has one")
    cache: Literal["block"] | None = flag(None, "faster, approximate: see igpo.sample")
    threshold: float | None = flag(None, "faster, approximate: see igpo.sample; try 0.9", "0..1")
    # in place of an evaluation
    rescore: str | None = flag(None, "grade a folder of results, or its samples.jsonl, again")
    compare: list[str] | None = flag(None, "folders of finished RL runs, each called NAME-SEED")
    ask: str | None = flag(None, "a question to answer step by step")
    speed: bool = flag(False, "time the sampler on random prompts")
    prompt_length: int = flag(64, "length of the prompts of --speed, tokens")

# =================================================================================================
# 1. Problems.

TASKS = {  # the data sets on the hub
    "gsm8k": "openai/gsm8k:main",
    "math500": "HuggingFaceH4/MATH-500",
    "amc": "AI-MO/aimo-validation-amc",
    "minerva": "math-ai/minervamath",
}

def load_problems(tasks, data, limit):
    """--tasks and --data -> {task: its problems} and {task: {reason: rows left out}}"""
    sources = dict(TASKS)
    for item in filter(None, data.split(",")):
        with user_errors("--data is TASK=SOURCE,TASK=SOURCE", ValueError):
            name, source = item.strip().split("=", 1)
        sources[name] = source
    names = tasks.replace(" ", "").split(",")
    for name in [*names, *sources]:
        if name not in TASKS:
            raise UsageError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")

    # Rows that cannot be graded are left out, as in training. The result is then not that of the
    # whole test set. So this is printed, and results.json holds it too.
    found = {}
    left_out = {}
    for name in names:
        source = sources[name]
        split = "train" if source == TASKS["amc"] else "test"  # it has no other
        left_out[name] = Counter()
        found[name] = igpo.read_problems(source, split=split, left_out=left_out[name])[:limit]
        as_text = sum(not igpo.is_mathematics(problem.answer) for problem in found[name])
        igpo.print0(f"{name}: {len(found[name])} problems of {source}; rows left out: "
                    f"{dict(left_out[name]) or 'none'}; references that only match as text: "
                    f"{as_text}")
    return found, left_out

# =================================================================================================
# 2. Sampling and grading. The processes work in rounds: each answers a batch, they exchange what
#    they got, and rank 0 appends it to samples.jsonl. A kill loses a round at most.

# An answer to be given, and at the same time the first fields of the sample that it becomes. The
# first three are its key. prompt holds token ids; in samples.jsonl it is text.
Job = namedtuple("Job", "task problem sample prompt reference")

def evaluate(model, tokenizer, found, left_out, cfg, out):
    """Answer and grade what the folder lacks, and write results.json."""
    jobs = plan_jobs(model, tokenizer, found, cfg)
    file = out / "samples.jsonl"
    if rank() == 0:
        settings = open_folder(out, model, jobs, cfg)
        igpo.cut_unfinished_line(file)
    igpo.barrier()  # the others read the folder when rank 0 has opened it
    samples = read_samples(file)
    igpo.print0(f"{len(samples)} of {len(jobs)} samples are in {out} already")

    tokens = 0
    started = time.time()
    for task in found:
        missing = [job for job in jobs if job.task == task and job[:3] not in samples]
        # Prompts of like length share a batch, so that there is little padding. They also share a
        # round, so that no process waits long for another.
        missing.sort(key=lambda job: len(job.prompt))
        for at in tqdm(range(0, len(missing), cfg.batch_size * world()), task, disable=rank() > 0):
            start = at + rank() * cfg.batch_size
            batch = missing[start : start + cfg.batch_size]
            # In the last round there may be nothing for this process. It takes part all the same.
            lines = answer_batch(model, tokenizer, batch, cfg) if batch else []
            for line in chain(*igpo.gather_objects(lines)):
                tokens += line["length"]
                samples[get_key(line)] = line
                if rank() == 0:
                    igpo.append_line(file, line)

    if rank() == 0:
        speed = tokens / (time.time() - started)
        write_results(out, [samples[job[:3]] for job in jobs], settings, left_out, speed)

def plan_jobs(model, tokenizer, found, cfg):
    """All answers to be given, in the order of the problems -> list of Jobs"""
    # A prompt that does not fit into the model together with a completion is cut on the left, as
    # lm-evaluation-harness does it. So one long row does not stop an evaluation, and the accuracy
    # is still that of all problems.
    room = model.config.max_position_embeddings - cfg.gen_length
    jobs = []
    for task, problems in found.items():
        prompts = igpo.encode_prompts(tokenizer, [problem.question for problem in problems])
        igpo.check_length(model, min(map(len, prompts)), cfg.gen_length)  # an error if none fits
        for i, prompt in enumerate(prompts):
            if len(prompt) > room:
                igpo.print0(f"{task} problem {i}: the model sees only the last {room} of the "
                            f"{len(prompt)} tokens of its prompt")
            for s in range(cfg.amc_samples if task == "amc" else 1):
                jobs.append(Job(task, i, s, prompt[-room:], problems[i].answer))
    return jobs

def answer_batch(model, tokenizer, jobs, cfg):
    """Sample and grade answers, all to the same task -> lines for samples.jsonl"""
    ids, mask = igpo.pad_prompts([job.prompt for job in jobs], model)
    completions = igpo.sample(
        model,
        ids,
        prompt_mask=mask,
        # Each sample has a random stream of its own, so that it does not depend on its batch.
        generator=[igpo.seeded((cfg.seed, job.task), "answer", job.problem, job.sample)
                   for job in jobs],
        temperature=cfg.amc_temperature if jobs[0].task == "amc" else 0.0,
        stop_early=True,
        **igpo.sampler_settings(cfg),
    )
    end_ids = model.config.eos_token_id
    lines = []
    for job, completion in zip(jobs, completions):
        line = job._asdict()
        line["prompt"] = tokenizer.decode(job.prompt)
        line["completion"] = igpo.decode(tokenizer, completion, end_ids)
        line["length"] = igpo.counted_tokens(completion, end_ids).sum().item()
        lines.append(line | grade_sample(line))
    return lines

def grade_sample(sample):
    """What is said of an answer. timed_out: the grader gave up, so the answer counts as wrong."""
    timeouts = igpo.GRADE_TIMEOUTS
    verdict = igpo.grade(sample["completion"], sample["reference"])
    return {"extracted": igpo.committed_answer(sample["completion"]), "verdict": verdict,
            "timed_out": igpo.GRADE_TIMEOUTS > timeouts}

# =================================================================================================
# 3. The folder of results.

def open_folder(out, model, jobs, cfg):
    """Make a folder of results, or enter one with the same settings -> settings"""
    # Settings are all that the samples depend on. For what is long there is a checksum.
    weights = 0
    for weight in model.state_dict().values():
        # As bytes: numpy has no bfloat16.
        weights = zlib.crc32(weight.cpu().reshape(-1).view(torch.uint8).numpy(), weights)
    problems = zlib.crc32(repr(jobs).encode())
    settings = vars(cfg) | {"out_dir": None, "problems": problems, "weights": weights}

    # They are compared before anything is written: the folder may be somebody else's.
    with user_errors(f"{out} holds no evaluation; give another --out_dir", OSError, ValueError):
        begun = any(out.glob("[!.]*"))
        before = json.loads((out / "settings.json").read_text()) if begun else settings
    differences = [f"{name} was {before.get(name)}, now it is {value}"
                   for name, value in settings.items() if before.get(name) != value]
    if differences:
        raise UsageError(f"{out} has samples made with other settings ({', '.join(differences)}); "
                         "give another --out_dir")
    igpo.lock_folder(out)
    igpo.write_file(out / "settings.json", json.dumps(settings, indent=2))
    return settings

# What a line of samples.jsonl must have. The last two --rescore finds again.
FIELDS = "task problem sample completion length reference verdict extracted timed_out".split()

def get_key(line):
    return line["task"], line["problem"], line["sample"]

def read_samples(path, fields=FIELDS):
    """{key: sample} of a samples file. Each line must have these fields."""
    samples = {}
    for number, line in enumerate(igpo.read_lines(path), 1):
        for name in fields:
            if name not in line:
                raise UsageError(f"{path}, line {number} is no sample: it has no {name!r}")
        samples[get_key(line)] = line
    return samples

def write_results(out, samples, settings, left_out, speed):
    """Write samples.jsonl in the order of the problems, and results.json, and print the results."""
    igpo.write_file(out / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in samples))
    results = summarise(samples)
    igpo.write_file(out / "results.json", json.dumps({
        "results": results,
        "settings": settings,
        "left_out": left_out,
        "processes": world(),
        "tokens_per_second": speed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "math-verify")},
    }, indent=2))
    print_table(results)
    print(f"{speed:.0f} tokens a second")

def summarise(samples):
    """Samples -> {task: its results}"""
    results = {}
    for task in dict.fromkeys(sample["task"] for sample in samples):
        own = [sample for sample in samples if sample["task"] == task]
        # The standard error is that over problems: the samples of one are not independent.
        verdicts = {}
        for sample in own:
            verdicts.setdefault(sample["problem"], []).append(sample["verdict"])
        accuracy, error = mean_and_error([fmean(v) for v in verdicts.values()])
        results[task] = {
            "accuracy": accuracy,
            "standard_error": error,
            "n": len(verdicts),
            "samples": len(own),
            "no_answer": fmean(sample["extracted"] is None for sample in own),
            "length": mean_of(own, "length"),
            "grade_timeouts": sum(sample["timed_out"] for sample in own),
        }
    return results

def mean_and_error(values):
    """The mean and its standard error, None of a single value."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return fmean(values), error

def mean_of(lines, name):
    return fmean(line[name] for line in lines)

def print_table(rows):
    """Print {name: {column: value}} in Markdown."""
    columns = list(next(iter(rows.values())))
    print(f"| {'':17} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        cells = [f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()]
        print(f"| {name:17} | {' | '.join(map(str.rjust, cells, map(len, columns)))} |")

# =================================================================================================
# 4. --rescore: grade samples again, for instance after a change of the grader.

def rescore(path):
    """Print every verdict that has changed, and the results. The file stays as it is."""
    if path.is_dir():
        path = path / "samples.jsonl"
    samples = read_samples(path, FIELDS[:-2]).values()
    if not samples:
        raise UsageError(f"--rescore: {path} holds no samples")
    changed = 0
    for sample in samples:
        before = sample["verdict"]
        sample |= grade_sample(sample)
        if sample["verdict"] != before:
            changed += 1
            print("{task} problem {problem} sample {sample}: {extracted!r} for {reference!r} "
                  "is now {verdict}".format(**sample))
    print_table(summarise(samples))
    print(f"{changed} of {len(samples)} verdicts changed")

# =================================================================================================
# 5. --compare: a table of RL runs, and two figures that GitHub draws.

STEPS = "RL steps"  # the x axes of the figures
RESPONSES = "thousand responses drawn"

def read_run(folder):
    """A finished RL run -> its row of the table, and lists with a value for each evaluation"""
    if not (folder / "summary.json").is_file():
        raise UsageError(f"{folder} holds no finished run (no summary.json)")
    path = folder / "metrics.jsonl"
    lines = igpo.read_lines(path)
    with user_errors(f"{path} lacks what today's igpo.py logs", KeyError, StatisticsError):
        rl = [line for line in lines if line["stage"] == "rl"]
        # The accuracy is the last value of its line. At step 0 accuracy_sft, where there is one,
        # takes the place of accuracy_start.
        accuracy = {line["step"]: [*line.values()][-1] for line in lines if line["stage"] == "eval"}
        drawn = [0, *accumulate(line["responses"] for line in rl)]
        tenth = max(len(rl) // 10, 1)
        row = {
            "accuracy before RL": accuracy[0],
            "after RL": accuracy[len(rl)],
            "all wrong, first tenth": mean_of(rl[:tenth], "all_wrong"),
            "last tenth": mean_of(rl[-tenth:], "all_wrong"),
            "after hints": mean_of(rl, "all_wrong_after"),
            "grad_norm": mean_of(rl, "grad_norm"),
            "final KL": mean_of(rl[-tenth:], "kl"),
        }
    return {"row": row, "accuracy": [*accuracy.values()], STEPS: [*accuracy],
            RESPONSES: [drawn[step] / 1000 for step in accuracy]}

def compare(folders):
    """Print a table of finished RL runs, which are grouped by name, and the two figures."""
    groups = {}
    for folder in map(Path, folders):
        name = re.sub(r"-\d+$", "", folder.resolve().name)
        groups.setdefault(name, []).append(read_run(folder))
    if len({str(run[STEPS]) for run in chain(*groups.values())}) > 1:
        raise UsageError("runs that were evaluated after different steps cannot be compared")

    # The table has the mean and the standard error over the runs of a group.
    table = {}
    for name, runs in groups.items():
        table[name] = {"runs": len(runs)}
        for column in runs[0]["row"]:
            known = mean_and_error([run["row"][column] for run in runs])
            table[name][column] = " ± ".join(f"{x:.3f}" for x in known if x is not None)
    print_table(table)
    print_figure(STEPS, groups)
    print_figure(RESPONSES, groups)

COLOURS = "royalblue darkorange green crimson purple gray brown teal magenta gold".split()

def print_figure(axis, groups):
    """Print the mean accuracy of each group as a line chart. It has no legend: its title is one."""
    # All lines need values at the same ticks. But after the same step, runs have drawn different
    # numbers of responses. So the ticks are the evaluations of the run that ends first on this
    # axis, and the accuracy of each run is interpolated there. What others did later is not shown:
    # the figure compares them at equal cost.
    ticks = min((run[axis] for run in chain(*groups.values())), key=max)
    palette = ", ".join(COLOURS[: len(groups)])
    print(f"""
```mermaid
%%{{init: {{"themeVariables": {{"xyChart": {{"plotColorPalette": "{palette}"}}}}}}}}%%
xychart-beta
    title "{', '.join(map(' '.join, zip(groups, COLOURS)))}"
    x-axis "{axis}" {ticks}
    y-axis "held-out accuracy" 0 --> 1""")
    for name, runs in groups.items():
        curves = [np.interp(ticks, run[axis], run["accuracy"]) for run in runs]
        print(f'    line "{name}" {np.mean(curves, axis=0).round(3).tolist()}')
    print("```")

# =================================================================================================
# 6. --ask and --speed.

def ask(model, tokenizer, cfg):
    """Show the denoising of an answer: a line for each step, in a terminal always the same one."""
    prompts, _ = igpo.pad_prompts(igpo.encode_prompts(tokenizer, [cfg.ask]), model)
    igpo.check_length(model, prompts.shape[1], cfg.gen_length)
    clear_screen = "\033[2J\033[H" if sys.stdout.isatty() else ""
    mask = tokenizer.decode(model.config.mask_token_id)

    def show(completions):
        text = tokenizer.decode(completions[0]).replace(mask, "_").replace("\n", "\\n")
        print(clear_screen + text, flush=True)

    [completion] = igpo.sample(model, prompts, watch=show, **igpo.sampler_settings(cfg))
    text = igpo.decode(tokenizer, completion, model.config.eos_token_id)
    print(f"\n{text}\n\nanswer: {igpo.committed_answer(text)}")

# Models with random weights. random-8b has the shape of LLaDA-8B: what is not said is Llama-7B's.
RANDOM = {
    "random": dict(vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                   num_attention_heads=8),
    "random-8b": dict(vocab_size=126464, intermediate_size=12288),
}

@torch.no_grad()
def time_sampler(model, cfg):
    """Time the sampler's variants -> {variant: row of the table}"""
    P = cfg.prompt_length
    L = cfg.gen_length
    igpo.check_length(model, P, L)
    canvas = torch.randint(model.config.vocab_size, (cfg.batch_size, P + L), device=model.device)
    block = torch.arange(P, P + cfg.block_length, device=model.device)
    rows = {}
    outputs = {}
    # The bare forwards are as many passes as the exact sampler makes, and nothing else. The first
    # exact run only warms up: the second takes its place in the table.
    for name in "exact", "bare forwards", "exact", "cache", "threshold", "cache + threshold":
        settings = igpo.sampler_settings(cfg) | {
            "cache": "block" if "cache" in name else None,
            "threshold": (cfg.threshold or 0.9) if "threshold" in name else None}
        completions = canvas[:, P:]
        passes = []
        started = time.perf_counter()
        if name == "bare forwards":
            passes = range(cfg.diffusion_steps)
            for _ in passes:
                igpo.logits_at(model, canvas, None, block)
        else:
            completions = igpo.sample(model, canvas[:, :P], watch=passes.append, **settings)
        outputs[name] = completions.cpu()  # waits for the GPU to finish
        seconds = time.perf_counter() - started
        rows[name] = {"seconds": seconds, "tokens/s": completions.numel() / seconds,
                      "forwards": len(passes)}
    # "as exact" is the share of the tokens that equal the exact sampler's.
    for name, row in rows.items():
        row["x bare"] = row["seconds"] / rows["bare forwards"]["seconds"]
        row["as exact"] = (outputs[name] == outputs["exact"]).float().mean().item()
    return rows

# =================================================================================================
# 7. The command line.

def main(argv=None):
    # What needs no model.
    cfg = igpo.parse_flags(Config, argv)
    if cfg.rescore is not None:
        return rescore(Path(cfg.rescore))
    if cfg.compare:
        return compare(cfg.compare)

    # What is wrong with the flags and the data is said before the weights are loaded.
    if not cfg.model:
        raise UsageError("no model: give --model FOLDER_OR_HUB_NAME")
    if cfg.ask is not None and not cfg.ask.strip():
        raise UsageError("--ask needs a question")
    igpo.count_blocks(cfg.gen_length, cfg.block_length, cfg.diffusion_steps)
    device = igpo.setup()
    igpo.announce(cfg.model, device)
    if not (cfg.speed or cfg.ask):
        found, left_out = load_problems(cfg.tasks, cfg.data, cfg.limit)

    dtype = igpo.compute_dtype(device)
    torch.manual_seed(cfg.seed)
    if cfg.speed and cfg.model in RANDOM:
        config = LlamaConfig(**RANDOM[cfg.model], is_causal=False, mask_token_id=0)
        with torch.device(device):  # nothing is downloaded, and nothing is copied
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        model, tokenizer = igpo.load_model(cfg.model, dtype=dtype, device=device)

    if cfg.ask:
        ask(model, tokenizer, cfg)
    elif cfg.speed:
        print_table(time_sampler(model, cfg))
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at most")
    else:
        out = Path(cfg.out_dir or f"runs/eval-{cfg.model.strip('./').replace('/', '-')}")
        evaluate(model, tokenizer, found, left_out, cfg, out)

if __name__ == "__main__":
    igpo.run_main(main, "eval.py")
