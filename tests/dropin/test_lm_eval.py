"""lm-eval, EleutherAI's harness: a patched model scores what stock scores."""

import importlib.util
import json

import pytest
from programs import BUNDLED, program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"),
]

QUESTIONS = [
    {"text": "import os\nimport", "choices": [" sys", " banana", " def"], "answer": 0},
    {"text": "def read(path):\n    with open(path) as", "choices": [" 7", " file", " import"], "answer": 1},
    {"text": "for index in range(", "choices": ["class", "import", "len"], "answer": 2},
    {"text": "class Stack:\n    def __init__(", "choices": ["self", "break", "3"], "answer": 0},
    {"text": "try:\n    value = int(text)\nexcept", "choices": [" return", " ValueError", " lambda"], "answer": 1},
    {"text": "if not isinstance(value,", "choices": [" while", " else", " str"], "answer": 2},
]
CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PERPLEXITY = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
TASKS = {"tiny_choices": CHOICES, "tiny_perplexity": PERPLEXITY, "tiny_generation": GENERATION}


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks over a file beside them: nothing is read from a hub."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(folder / "questions.json")))
    return folder


def scores(tasks, folder, *start, **variables):
    """What lm-eval measures, by task, and what it says meanwhile."""
    command = [*start, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={BUNDLED},dtype=float32"]
    command += ["--tasks", ",".join(TASKS), "--include_path", tasks, "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", folder, "--log_samples"]
    done = program(*command, HF_DATASETS_CACHE=str(folder / "cache"), TRANSFORMERS_VERBOSITY="info", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(folder.rglob("results_*.json")).read_text())["results"]
    samples = {task: next(folder.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines() for task in TASKS}
    numbers = {
        (task, name): value
        for task, row in found.items()
        for name, value in row.items()
        if isinstance(value, float) and "stderr" not in name
    }
    answers = [json.loads(line)["filtered_resps"] for line in samples["tiny_generation"]]
    return numbers, answers, done.stderr


def test_the_numbers_are_those_of_stock(tasks, tmp_path):
    stock, answers, _ = scores(tasks, tmp_path / "stock")
    ours, same, said = scores(tasks, tmp_path / "ours", "-m", "hf_accel_patch", "run")
    assert "LlamaForCausalLM: attention" in said
    assert ours == pytest.approx(stock, rel=1e-5) and same == answers
    assert stock["tiny_choices", "acc,none"] > 0.6 and len(answers) == len(QUESTIONS)
    quantized, _, said = scores(tasks, tmp_path / "int4", "-m", "hf_accel_patch", "run", HF_ACCEL_QUANTIZE="int4")
    assert any("LlamaForCausalLM: quantize" in line and "int4" in line for line in said.splitlines())
    bits = "tiny_perplexity", "bits_per_byte,none"
    assert quantized[bits] != stock[bits] and quantized[bits] == pytest.approx(stock[bits], rel=0.1)
