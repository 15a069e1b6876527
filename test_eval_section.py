import dataclasses
import importlib.metadata
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import igpo

HERE = Path(__file__).parent

# ---------------------------------------------------------------------------------------------------------------------
# eval.py


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row, problem", [
    ({"question": "2 + 16?", "answer": "2 + 16 = <<2+16=18>>18.\n#### 18"}, ("2 + 16?", "18")),          # GSM8K
    ({"question": "a lot?", "answer": "Much.\n#### 1,080"}, ("a lot?", "1,080")),
    ({"problem": "Half?", "answer": r"\frac{1}{2}"}, ("Half?", r"\frac{1}{2}")),                          # MATH500
    ({"problem": "Half?", "solution": r"It is \boxed{3}.", "answer": "4"}, ("Half?", "4")),
    ({"problem": "x + y?", "answer": 36.0, "url": "none"}, ("x + y?", "36")),                             # AMC
    ({"problem": "zero?", "answer": 0, "solution": r"\boxed{1}"}, ("zero?", "0")),
    ({"problem": "x?", "answer": 1.5}, ("x?", "1.5")),
    ({"problem": "s?", "solution": r"\[s=\boxed{1.6} \mathrm{~cm}\]"}, ("s?", "1.6")),                    # Minerva
    ({"problem": "s?", "solution": r"\boxed{1} then \boxed{\frac{2}{\text{3}}}"}, ("s?", r"\frac{2}{\text{3}}")),
    ({"question": "s?", "answer": r"so \boxed{7}"}, ("s?", "7")),
    ({"question": "s?", "answer": "", "solution": r"\boxed{7}"}, ("s?", "7"))])
def test_the_four_file_formats(tmp_path, row, problem):
    assert evaluation.read_problems(jsonl(tmp_path / "data.jsonl", row)) == [problem]


@pytest.mark.parametrize("content, message", [
    ('{"problem": "1?", "answer": "1"}\n{"problem', r"data.jsonl, line 2: not JSON"),
    ('{"text": "1?", "answer": "1"}', r"row 1: no column 'problem\|question' \(it has text, answer\)"),
    ('{"problem": "1?", "reply": "1"}', r"row 1: no column 'answer\|solution' \(it has problem, reply\)"),
    ('{"problem": "1?", "solution": "so it is 1"}', r"row 1: no answer, and no #### or \\boxed"),
    ("[1]", "row 1: no column"), ("", "holds no rows")])
def test_bad_problem_files_are_named(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(igpo.UsageError, match=message):
        evaluation.read_problems(str(tmp_path / "data.jsonl"))


def test_hub_names_and_alternatives(monkeypatch):
    """GSM8K needs its subset, AMC its train split; where that is not to be had, amc23 stands in."""
    asked = []

    def read_rows(source, columns, split, subset):
        asked.append((source, split, subset))
        if source.startswith("AI-MO"):
            raise igpo.UsageError("cannot load it")
        return [{"problem": "1?", "answer": 1.0}] * 3

    monkeypatch.setattr(evaluation, "read_rows", read_rows)
    assert [evaluation.task_problems(task, None, 2) for task in evaluation.TASKS] == [
        (source, [("1?", "1")] * 2)
        for source in ("openai/gsm8k", "HuggingFaceH4/MATH-500", "math-ai/amc23", "math-ai/minervamath")]
    assert asked == [("openai/gsm8k", "test", "main"), ("HuggingFaceH4/MATH-500", "test", None),
                     ("AI-MO/aimo-validation-amc", "train", None), ("math-ai/amc23", "test", None),
                     ("math-ai/minervamath", "test", None)]
    monkeypatch.setitem(evaluation.TASKS, "amc", ["AI-MO/aimo-validation-amc"])
    with pytest.raises(igpo.UsageError, match="cannot load it .--data amc=FILE."):
        evaluation.task_problems("amc")


def made_samples(verdicts, length=10):
    """{problem: verdicts of its samples} -> samples"""
    return [dict(task="amc", problem=i, sample=s, completion="", extracted=None if v else "1", reference="1", verdict=v,
                 timed_out=False, length=length + i) for i, vs in verdicts.items() for s, v in enumerate(vs)]


def test_accuracy_and_standard_error_by_hand():
    greedy = evaluation.summarise(made_samples({0: [True], 1: [False], 2: [False], 3: [True], 4: [False]}))
    # p = 2/5; the variance of the five numbers is (2 * 0.6^2 + 3 * 0.4^2) / 4 = 0.3, of their mean 0.3 / 5 = 0.06
    assert greedy["accuracy"] == pytest.approx(0.4) and greedy["standard_error"] == pytest.approx(0.06 ** 0.5)
    assert (greedy["n"], greedy["samples"], greedy["completion_length"], greedy["no_answer"]) == (5, 5, 12, 0.4)
    # avg@4: the problems' means are 1, 1/4 and 1/4: mean 1/2, variance (1/4 + 1/16 + 1/16) / 2 = 3/16, / 3 = 1/16
    T, F = True, False
    avg = evaluation.summarise(made_samples({0: [T, T, T, T], 1: [F, F, T, F], 2: [T, F, F, F]}))
    assert avg["accuracy"] == 0.5 and avg["standard_error"] == pytest.approx(0.25)
    assert (avg["n"], avg["samples"]) == (3, 12)
    assert evaluation.summarise(made_samples({0: [T, F]}))["standard_error"] is None  # one problem says nothing of it


def test_batches_hold_every_sample_once():
    prompts = [[0] * n for n in (5, 1, 9, 3, 7)]
    batches = evaluation.batches_of(prompts, 3, 4, seed=0)
    assert sorted(job for jobs in batches for job in jobs) == [(i, s) for i in range(5) for s in range(3)]
    assert sorted(map(len, batches)) == [3, 4, 4, 4]
    assert [(1, 0), (1, 1), (1, 2), (3, 0)] in batches  # 1 and 3 are the shortest prompts


def test_settings_are_compared_once_there_are_samples(tmp_path):
    evaluation.claim(tmp_path, {"seed": 0, "limit": None})
    evaluation.claim(tmp_path, {"seed": 1, "limit": None})  # nothing was sampled with the first
    jsonl(tmp_path / "samples.rank_3.jsonl", {})
    evaluation.claim(tmp_path, {"seed": 1, "limit": None})
    with pytest.raises(igpo.UsageError, match="other settings: limit was None, now it is 5. Give another --out_dir"):
        evaluation.claim(tmp_path, {"seed": 1, "limit": 5})


def test_one_evaluation_at_a_time_writes_to_a_folder(tmp_path):
    """A torchrun killed by SIGKILL leaves its processes behind; a second run beside them lost a batch."""
    with evaluation.locked(tmp_path / "out"):
        with pytest.raises(igpo.UsageError, match="another evaluation is writing to"):
            with evaluation.locked(tmp_path / "out"):
                pass
    with evaluation.locked(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(igpo.UsageError, match="cannot write to .*file"):
        with evaluation.locked(tmp_path / "file"):
            pass


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model, files of two tasks, and an uninterrupted evaluation by one process."""
    folder = tmp_path_factory.mktemp("eval")
    igpo.save_model(*igpo.toy_model(0), folder / "model")
    locks = igpo.toy_problems(12, 0)
    jsonl(folder / "gsm8k.jsonl", *[{"question": p.question[: 3 + i % 7], "answer": f"#### {p.answer}"}
                                    for i, p in enumerate(locks[:7])])
    jsonl(folder / "amc.jsonl", *[{"problem": p.question, "answer": float(i % 7)} for i, p in enumerate(locks[7:])])
    flags = ["--model", str(folder / "model"), "--tasks", "gsm8k,amc", "--gen_length", "8", "--diffusion_steps", "8",
             "--data", f"gsm8k={folder}/gsm8k.jsonl,amc={folder}/amc.jsonl", "--block_length", "4", "--batch_size", "4",
             "--amc_temperature", "2", "--amc_samples", "6"]
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])
    return folder, flags


def outcome(out):
    """What must not depend on how an evaluation was run: the samples, and the results but for the speed."""
    result = json.loads((out / "results.json").read_text())
    for task in result["results"].values():
        del task["tokens_per_second"]
    return (out / "samples.jsonl").read_bytes(), result["results"], result["settings"]


def test_what_an_evaluation_leaves_behind(toy, capsys):
    folder, flags = toy
    samples = evaluation.read_samples(folder / "whole" / "samples.jsonl")
    assert [evaluation.key(s) for s in samples] == [("gsm8k", i, 0) for i in range(7)] + [
        ("amc", i, s) for i in range(5) for s in range(6)]
    assert {type(s["verdict"]) for s in samples} == {bool} and len({s["completion"] for s in samples[-6:]}) > 1
    assert all(s["verdict"] == igpo.grade(s["completion"], s["reference"]) for s in samples)
    assert samples[1]["prompt"] == json.loads((folder / "gsm8k.jsonl").read_text().split("\n")[1])["question"]
    assert set(samples[0]) == {"task", "problem", "sample", "prompt", "completion", "extracted", "reference", "verdict",
                               "timed_out", "length"}
    result = json.loads((folder / "whole" / "results.json").read_text())
    assert [(r["n"], r["samples"]) for r in result["results"].values()] == [(7, 7), (5, 30)]
    assert all(r["tokens_per_second"] > 0 for r in result["results"].values())
    settings = result["settings"]
    assert settings["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert settings["amc_temperature"] == 2
    assert set(settings) >= {f.name for f in dataclasses.fields(evaluation.Config)} - {
        "out_dir", "overwrite", "rescore"}
    assert result["versions"]["math-verify"] == importlib.metadata.version("math-verify")
    assert not list((folder / "whole").glob("*rank*")) and not list((folder / "whole").glob("*unfinished"))

    before = outcome(folder / "whole"), result["results"]["amc"]["tokens_per_second"]
    evaluation.main([*flags, "--out_dir", str(folder / "whole")])  # nothing left to do
    shown = capsys.readouterr().out
    assert "37 of 37 samples are in" in shown and re.search(r"^amc +\d+\.\d\d .* 30 ", shown, re.M)
    result = json.loads((folder / "whole" / "results.json").read_text())
    assert (outcome(folder / "whole"), result["results"]["amc"]["tokens_per_second"]) == before

    with pytest.raises(igpo.UsageError, match="other settings: seed was 0, now it is 1"):
        evaluation.main([*flags, "--out_dir", str(folder / "whole"), "--seed", "1"])


def test_igpo_evaluates_by_the_same_code(toy, tmp_path, monkeypatch):
    """With a verdict that depends on every character of the completion, both have the same accuracy."""
    folder, flags = toy
    for module in (igpo, evaluation):
        monkeypatch.setattr(module, "grade", lambda completion, reference: sum(completion.encode()) % 2 == 0)
    evaluation.main([*flags, "--tasks", "gsm8k", "--out_dir", str(tmp_path)])
    model, tokenizer = igpo.load_model(folder / "model")
    examples = [igpo.Example(igpo.encode_prompt(tokenizer, question), answer, None)
                for question, answer in evaluation.read_problems(f"{folder}/gsm8k.jsonl")]
    cfg = igpo.Config(gen_length=8, diffusion_steps=8, block_length=4, rows_per_call=3)
    accuracy = json.loads((tmp_path / "results.json").read_text())["results"]["gsm8k"]["accuracy"]
    assert igpo.evaluate(model, tokenizer, examples, cfg) == accuracy and 0 < accuracy < 1


def torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval.py", *flags]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=100)


def test_two_processes_have_the_results_of_one(toy):
    """The ten batches of 4 are shared out by fives, but for what one process had left there already."""
    folder, flags = toy
    (folder / "two").mkdir()
    for name in ("settings.json", "samples.jsonl"):
        lines = (folder / "whole" / name).read_text().splitlines(keepends=True)
        (folder / "two" / name).write_text("".join(lines[:9] if name == "samples.jsonl" else lines))
    done = torchrun(*flags, "--out_dir", str(folder / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("std. error") == 1
    assert outcome(folder / "two") == outcome(folder / "whole")


def test_a_killed_evaluation_continues(toy):
    """Killed while it writes; then as a kill may leave it, with half a line, and of two processes."""
    folder, flags = toy
    out = folder / "killed"
    process = subprocess.Popen([sys.executable, "eval.py", *flags, "--out_dir", str(out)], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / "samples.jsonl").is_file() and (out / "samples.jsonl").stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    evaluation.main([*flags, "--out_dir", str(out)])
    assert outcome(out) == outcome(folder / "whole")

    whole = (folder / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(b"".join(whole[:3] + whole[20:23]) + whole[9][:-25])
    (out / "samples.rank_1.jsonl").write_bytes(whole[30] + whole[2] + whole[11][:1])
    assert len(evaluation.read_samples(out / "samples.jsonl")) == 6
    evaluation.main([*flags, "--out_dir", str(out)])
    assert outcome(out) == outcome(folder / "whole") and not list(out.glob("*rank*"))


def test_another_checkpoint_in_the_same_folder_is_noticed(toy):
    folder, flags = toy
    model, tokenizer = igpo.load_model(folder / "model")
    igpo.save_model(model, tokenizer, folder / "moving")
    flags = [*flags, "--model", str(folder / "moving"), "--limit", "1", "--out_dir", str(folder / "moved")]
    evaluation.main(flags)
    model.lm_head.weight.data[0, 0] += 1e-3
    igpo.save_model(model, tokenizer, folder / "moving")
    with pytest.raises(igpo.UsageError, match="weights_checksum was"):
        evaluation.main(flags)
    evaluation.main([*flags, "--overwrite"])


def test_rescore(toy, tmp_path, capsys):
    folder, _ = toy
    capsys.readouterr()
    evaluation.main(["--rescore", str(folder / "whole" / "samples.jsonl")])
    assert "0 of 37 verdicts changed" in capsys.readouterr().out
    stored = [(r"\boxed{0.25}", False), (r"\boxed{3}", True), (r"\boxed{\frac14}", True)]
    rows = [dict(task="math500", problem=i, sample=0, completion=completion, reference="1/4", verdict=verdict, length=9)
            for i, (completion, verdict) in enumerate(stored)]
    path = Path(jsonl(tmp_path / "samples.jsonl", *rows))
    before = path.read_bytes()
    evaluation.main(["--rescore", str(path)])
    shown = capsys.readouterr().out
    assert "2 of 3 verdicts changed" in shown and re.search(r"^math500 +66.67 +33.33 +3 ", shown, re.M)
    assert "math500 problem 0 sample 0: wrong -> right, '0.25' for '1/4'" in shown
    assert "math500 problem 1 sample 0: right -> wrong, '3' for '1/4'" in shown and path.read_bytes() == before


def test_grader_timeouts_are_reported(monkeypatch):
    def grade(completion, reference):
        igpo.GRADE_TIMEOUTS += completion == "slow"
        return completion == "right"

    monkeypatch.setattr(evaluation, "grade", grade)
    samples = [s | {"completion": c} | evaluation.graded(c, "1") for s, c in
               zip(made_samples({0: [True], 1: [True], 2: [True]}), ["right", "slow", "wrong"])]
    assert [(s["verdict"], s["timed_out"]) for s in samples] == [(True, False), (False, True), (False, False)]
    results = evaluation.summarise(samples)
    assert results["grade_timeouts"] == 1
    assert "\n1 answers could not be graded in time" in evaluation.table({"amc": results})


@pytest.mark.parametrize("flags, message", [
    (["--tasks", "gsm8k"], "no model; give --model"),
    (["--model", "m", "--tasks", "gsm8k,aime"], "no task 'aime'; there are gsm8k, math500, amc, minerva"),
    (["--model", "m", "--tasks", ","], "no task ''; there are"),
    (["--model", "m", "--data", "math=a.jsonl"], "--data takes TASK=FILE, TASK being one of .* not 'math'"),
    (["--model", "m", "--tasks", "amc", "--data", "amc=absent.jsonl"], "no data file at absent.jsonl"),
    (["--model", "m", "--gen_length", "100"], "--gen_length 100 is not divisible by --block_length 32"),
    (["--model", "m", "--diffusion_steps", "100"], "--diffusion_steps 100 is not divisible by the number of blocks, 8"),
    (["--model", "m", "--limit", "0"], "--limit is at least 1, not 0"),
    (["--model", "m", "--temperature", "-1"], "--temperature is at least 0, not -1"),
    (["--model", "m", "--nonsense", "1"], "unrecognized arguments: --nonsense"),
    (["--rescore", "absent.jsonl"], "no samples file at absent.jsonl")])
def test_what_a_user_of_eval_gets_wrong_is_one_line(tmp_path, flags, message):
    with pytest.raises(igpo.UsageError, match=message) as error:
        evaluation.main([*flags, "--out_dir", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, message", [
    ('{"task": 1}\n', "line 1: no column 'completion' .it has task."),
    ("{\n{}\n", "line 1: not JSON"), ("", "no samples")])
def test_bad_samples_files_are_named(tmp_path, content, message):
    (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(igpo.UsageError, match=message):
        evaluation.main(["--rescore", str(tmp_path / "samples.jsonl")])


def test_the_command_exits_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "./absent", "--tasks", "amc", "--data", "amc=absent.jsonl"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "eval.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "eval.py: no data file at absent.jsonl\n")
