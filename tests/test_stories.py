"""Stories: each continues its caption as the model does, and depends on caption and seed alone."""

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import BART, CLIP, GPT
from forks import files
from transformers import AutoModelForCausalLM, AutoTokenizer

import stories
from antarctic import causal_lm, runtime
from antarctic.decoding import invert, nucleus
from antarctic.sealed import seal

CAPTIONS = [
    "a red dog",
    "A whale by a lighthouse.",
    "two sheep and an umbrella in a quiet wood",
    "Geoff Hinton on a bus",
    "a red dog",
    "a pair of red windmills, a black turtle, a yellow rocket, and four purple pigs by a train in "
    "the dark",
]


@pytest.fixture(scope="module")
def lm():
    """The model and tokenizer as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(GPT, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(GPT)


@pytest.fixture
def tell(script, tmp_path):
    """tell(arguments..., captions=CAPTIONS) runs the script on a list or a file of captions.

    Returns the records of stories.jsonl.
    """
    def run(*arguments, captions=CAPTIONS):
        if isinstance(captions, list):
            source = ["--caption", *captions]
        else:
            source = ["--captions", captions]
        result = script("stories", *source, "--savedir", tmp_path / "out", "--lm", GPT, "--device",
                        "cpu", *arguments)
        assert result.code == 0, result.err
        with open(tmp_path / "out" / "stories.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    return run


@pytest.mark.slow
def test_a_batch_equals_one_by_one(tell):
    options = ("--num_return_sequences", 3, "--top_p", 1)
    records = tell(*options, "--batch_size", 64)
    assert records == tell(*options, "--batch_size", 1) == tell(*options, "--batch_size", 5)
    for index in (0, 2, 5):  # not 4: a repeated caption gets different stories
        assert tell(*options, captions=[CAPTIONS[index]]) == [records[index]]


def test_a_story_is_drawn_as_by_the_plain_loop(lm):
    """The plain loop reads the whole text for each token, without padding and without a cache."""
    model, tokenizer = lm
    texts = [f"Once upon a time there was {caption}" for caption in CAPTIONS]
    prompts = tokenizer(texts)["input_ids"]
    ours = causal_lm.load_lm(GPT, [tokenizer.eos_token_id], "cpu", torch.float32)
    samples = causal_lm.sample(ours, prompts, range(len(prompts)), 60, temperature=1.3, top_p=0.95)
    assert any(ended for _, ended in samples)
    for seed, (prompt, (new, ended)) in enumerate(zip(prompts, samples)):
        generator, ids = torch.Generator().manual_seed(seed), list(prompt)
        while len(ids) < len(prompt) + 60 and ids[-1] != tokenizer.eos_token_id:
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1:]
            p, order = nucleus(logits / 1.3, 0.95)
            uniform = torch.rand(1, generator=generator, dtype=torch.double)
            ids.append(order[0, invert(p, uniform)].item())
        assert ended == (ids[-1] == tokenizer.eos_token_id)
        assert prompt + new == (ids[:-1] if ended else ids)


def test_near_temperature_zero_the_story_is_the_greedy_one(tell, lm):
    model, tokenizer = lm
    records = tell("--temperature", "1e-7", "--num_return_sequences", 2)
    for record in records:
        inputs = tokenizer(record["prompt"], return_tensors="pt")
        greedy = model.generate(**inputs, do_sample=False, max_new_tokens=100, pad_token_id=0)[0]
        if greedy[-1] == tokenizer.eos_token_id:
            assert record["stories"] == [tokenizer.decode(greedy, skip_special_tokens=True)] * 2
        else:
            assert all(tokenizer.decode(greedy).startswith(story) for story in record["stories"])


def test_the_seed_decides(tell):
    records, same_seed, other_seed = tell("--seed", 7), tell("--seed", 7), tell("--seed", 8)
    assert records == same_seed
    assert all(a["stories"] != b["stories"] for a, b in zip(records, other_seed))


def test_a_caption_has_as_many_stories_as_asked_and_all_begin_with_its_prompt(tell, tmp_path):
    few, many = tell("--num_return_sequences", 2), tell("--num_return_sequences", 5)
    lines = (tmp_path / "out" / "stories.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [" ".join(story.split()) for record in many for story in record["stories"]]
    for caption, record, fewer in zip(CAPTIONS, many, few):
        assert record["caption"] == caption and "image_id" not in record
        assert len(record["stories"]) == len(set(record["stories"])) == 5
        assert record["stories"][:2] == fewer["stories"]  # a larger number keeps the first stories
        for story in record["stories"]:
            assert story.startswith(record["prompt"]) and len(story) > len(record["prompt"])
    assert not set(many[0]["stories"]) & set(many[4]["stories"])  # the same caption twice


@pytest.mark.parametrize("template, caption, prompt", [
    ("Once upon a time there was {caption}", "A whale.", "Once upon a time there was a whale"),
    ("Once upon a time there was {caption}", "Antarctica .",
     "Once upon a time there was Antarctica"),
    ("{caption}. One day", "The whale.", "The whale. One day"),
    ("{} {0} {name} {caption}{{", "a whale", "{} {0} {name} a whale{{"),
    ("There was {caption}", "Two dogs are running.", "There was Two dogs are running"),
    ("There {was} {caption}", "Two dogs are running.", "There were two dogs running"),
    ("I saw what {was}: {caption}, {was} it?", "The whale.", "I saw what was: a whale, was it?"),
    ("There {was} {caption}", "{caption} {was}", "There was a {caption} {was}"),
])
def test_the_caption_is_set_into_the_template(template, caption, prompt):
    assert stories.fill(template, caption) == prompt


def test_all_forms_of_captions_agree(tell, tmp_path):
    ids = [42, "photos/a.jpg", 7, 8, 9, 10]
    results = [{"image_id": i, "caption": caption} for i, caption in zip(ids, CAPTIONS)]
    details = {"file": "x.jpg", "table": [], "candidates": []}
    forms = {
        "preds.txt": "".join(f"{caption}\n" for caption in CAPTIONS),
        "captions.json": json.dumps(results),
        "details.jsonl": "".join(json.dumps(result | details) + "\n" for result in results),
        "marked.txt": "\ufeff" + "\r\n\r\n".join(CAPTIONS),
    }
    expected = tell()
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        records = tell(captions=tmp_path / name)
        image_ids = [record.pop("image_id", None) for record in records]
        assert image_ids == ([None] * 6 if name.endswith(".txt") else ids)
        assert records == expected


def test_without_a_folder_stories_are_printed_as_they_come_in_order_of_the_captions(
        script, tell, monkeypatch):
    """Two prompts leave less room than --max_tokens, so their stories are in separate batches."""
    captions = ["a " + " ".join(["red dog"] * 50), *CAPTIONS, "a " + " ".join(["red dog"] * 51)]
    options = ("--max_tokens", 40, "--batch_size", 2, "--num_return_sequences", 2)
    outputs, write = [], stories.write  # what is printed before each batch

    def recording_write(*batch):
        outputs.append(sys.stdout.getvalue())
        return write(*batch)

    monkeypatch.setattr(stories, "write", recording_write)
    result = script("stories", "--caption", *captions, "--lm", GPT, "--device", "cpu", *options)
    assert result.code == 0, result.err
    lines = [" ".join(story.split()) for record in tell(*options, captions=captions)
             for story in record["stories"]]
    assert result.out.splitlines() == lines
    counts = [output.count("\n") for output in outputs[:8]]
    assert counts[0] == 0 and counts[4] >= 2 and counts == sorted(counts)


def run_with_stdout(stream, *arguments):
    """Runs the script with a stream as standard output. Returns its exit code and its errors."""
    err = io.StringIO()
    argv = ["stories.py", "--lm", GPT, "--device", "cpu", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv):
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(err):
            try:
                runtime.run(stories.main)
            except SystemExit as stop:
                return stop.code, err.getvalue()
    return 0, err.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_terminal_cannot_show_comes_as_escapes(tell, encoding):
    captions = ["ein B\u00e4r", "\u732b \U0001f408"]
    texts = [record["stories"][0] for record in tell(captions=captions)]
    assert "\u00e4" in texts[0] and "\u732b" in texts[1]
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    assert run_with_stdout(stream, "--caption", *captions)[0] == 0
    expected = "".join(" ".join(story.split()) + "\n" for story in texts)
    assert stream.buffer.getvalue() == expected.encode(encoding, "backslashreplace")


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


def test_where_nobody_reads_results_are_written_all_the_same(tell, tmp_path):
    expected = tell()
    with closed_pipe() as stream:
        code, err = run_with_stdout(stream, "--caption", *CAPTIONS, "--savedir",
                                    tmp_path / "closed")
    assert code == 0 and "error" not in err and "Traceback" not in err
    lines = (tmp_path / "closed" / "stories.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == expected
    assert files(tmp_path / "closed") == files(tmp_path / "out")


def test_where_nobody_reads_and_nothing_is_written_the_run_ends_with_a_sentence():
    with closed_pipe() as stream:
        code, err = run_with_stdout(stream, "--caption", *CAPTIONS)
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: the stories cannot be printed (Broken pipe); --savedir writes them to files")


def test_a_long_story_is_printed_whole(capsys):
    text = "It\x1b[31m was \n" + "very " * 1000 + "red."
    stories.print_line(text)
    assert capsys.readouterr().out == "It\\x1b[31m was " + "very " * 1000 + "red.\n"


def test_a_story_broken_off_ends_with_its_last_full_sentence(tell):
    whole = tell("--num_return_sequences", 4, captions=CAPTIONS[:3])
    cut = tell("--num_return_sequences", 4, "--max_tokens", 20, captions=CAPTIONS[:3])
    for record, cut_record in zip(whole, cut):
        for story, short in zip(record["stories"], cut_record["stories"]):
            assert story.startswith(short) and short.endswith(".") and len(short) < len(story)


@pytest.mark.parametrize("new, ended, more", [
    (" near a cat. It was", False, " near a cat."),
    (' near a cat. "It was sad!" The dog', False, ' near a cat. "It was sad!"'),
    (" of 3.5 years and", False, " of 3.5 years and"),  # no sentence ends
    (" near a cat. It was", True, " near a cat. It was"),  # the model's own end
])
def test_only_what_is_broken_off_is_cut(lm, new, ended, more):
    prompt = "Mr. Hinton"
    ids, new = (lm[1](text)["input_ids"] for text in (prompt, new))
    assert causal_lm.to_text(lm[1], prompt, ids, new, ended) == prompt + more


def test_positions_bound_a_story_and_no_neighbour_does(tell, lm):
    """Prompts of several lengths, near the model's 128 positions, share a run with short prompts,
    which leave room for all tokens."""
    long = ["a " + " ".join(["red dog"] * n) for n in (50, 30, 51, 51)]
    assert len(lm[1](f"Once upon a time there was {long[-1]}")["input_ids"]) in range(100, 128)
    records = tell("--top_p", 1, "--batch_size", 8, captions=long + CAPTIONS)
    for caption in (long[0], long[1], CAPTIONS[0]):
        assert tell("--top_p", 1, captions=[caption])[0] in records
    for record in records:
        assert len(lm[1](record["stories"][0])["input_ids"]) <= 128


def test_a_tokenizer_that_cannot_pad_will_do(tell, tmp_path):
    """GPT-2's and GPT-Neo's on the hub are such tokenizers."""
    expected = tell()
    folder = tmp_path / "gpt"
    AutoModelForCausalLM.from_pretrained(GPT).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(GPT) / name, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert tell("--lm", folder) == expected


def test_settings_that_a_model_brings_do_not_steer_the_sampling(tell, tmp_path):
    folder = tmp_path / "gpt"
    model = AutoModelForCausalLM.from_pretrained(GPT)
    model.generation_config.update(repetition_penalty=5.0, min_new_tokens=90, max_length=10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(GPT).save_pretrained(folder)
    assert tell("--lm", folder) == tell()


# ---------------------------------------------------------------------------------------- bad input

@pytest.fixture
def refuse(script, tmp_path):
    """refuse(named, arguments...): exit code 2, one sentence with the text named, and no story."""
    def run(named, *arguments):
        if not {"--caption", "--captions"} & set(arguments):
            arguments = ("--caption", "a dog", *arguments)
        result = script("stories", "--savedir", tmp_path / "out", "--lm", GPT, *arguments)
        assert result.code == 2 and result.out == "", result.err
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        assert str(named) in result.err, result.err
        assert not list((tmp_path / "out").glob("*"))
    return run


@pytest.mark.parametrize("name", ["stories.txt", "stories.jsonl",
                                  "stories-0123456789abcdef.jsonl.part"])
def test_no_file_that_is_read_is_replaced_or_removed(script, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    captions = out / name
    captions.write_text('{"caption": "a dog"}\n')
    link, hard = tmp_path / "link.jsonl", tmp_path / "hard.jsonl"
    link.symlink_to(captions)
    os.link(captions, hard)
    for path in (captions, out / ".." / "out" / name, link, hard):
        result = script("stories", "--captions", path, "--savedir", out, "--lm", GPT)
        assert result.code == 2 and "would be replaced" in result.err, result.err
        assert files(out) == {name: b'{"caption": "a dog"}\n'}


@pytest.mark.parametrize("function", ["captions_of", "write_results"])
def test_an_error_of_a_file_that_nothing_else_tells_is_a_sentence_that_names_it(
        script, tmp_path, monkeypatch, function):
    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "a\x1b[31m.txt")

    monkeypatch.setattr(stories, function, fail)
    result = script("stories", "--caption", "a dog", "--savedir", tmp_path, "--lm", GPT)
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith(
        "error: cannot use a\\x1b[31m.txt (Permission denied)"), result.err


def test_only_unfinished_runs_are_removed(tell, tmp_path):
    (tmp_path / "out").mkdir()
    mine, left = (tmp_path / "out" / f"stories-{end}.jsonl.part" for end in ("mine", "0" * 16))
    for path in (mine, left):
        path.touch()
    tell()
    assert mine.exists() and not left.exists()


@pytest.mark.parametrize("named, arguments", [
    ("nowhere.txt", ["--captions", "nowhere.txt"]),
    ("exactly one", ["--caption", "a dog", "--captions", "nowhere.txt"]),
    ("no caption", ["--caption", "", " . "]),
    ("{caption}", ["--prompt", "Once upon a time"]),
    ("{caption}", ["--prompt", "There was {Caption} {"]),
    ("--temperature", ["--temperature", "0"]),
    ("--temperature", ["--temperature", "nan"]),
    ("--top_p", ["--top_p", "2"]),
    ("--max_tokens", ["--max_tokens", "0"]),
    ("--num_return_sequences", ["--num_return_sequences", "0"]),
    ("--batch_size", ["--batch_size", "-1"]),
    ("nobody/nothing", ["--lm", "nobody/nothing"]),
    (CLIP, ["--lm", CLIP]),
    (BART, ["--lm", BART]),
    ("128", ["--caption", "a dog", "a dog " * 200]),
    ("device", ["--device", "abacus"]),
])
def test_what_cannot_work_is_named(refuse, named, arguments):
    refuse(named, *arguments)


def test_a_prompt_may_fill_all_positions_but_one(tell, refuse, lm):
    captions = ["a" + " red" * n for n in range(140)]
    lengths = [len(lm[1](f"Once upon a time there was {caption}")["input_ids"])
               for caption in captions]
    refuse("128", "--caption", captions[lengths.index(128)])
    assert len(tell(captions=[captions[lengths.index(127)]])) == 1


def test_a_model_without_weights_is_named(refuse, tmp_path):
    shutil.copy(Path(GPT) / "config.json", tmp_path)
    refuse(tmp_path, "--lm", tmp_path)


@pytest.mark.parametrize("name, text", [
    ("a.txt", b""), ("a.txt", b"\n \n"), ("a.txt", "ein Bär".encode("utf-16")),
    ("a.jsonl", b""), ("a.jsonl", b"a dog\n"), ("a.jsonl", b'{"captions": []}'),
    ("a.jsonl", b'{"caption": "a dog"}\n{"caption'),
    ("a.json", b""), ("a.json", b"[]"), ("a.json", b"a dog\n"), ("a.json", b'["a dog"]'),
    ("a.json", b'[{"image_id": 1}]'), ("a.json", b'[{"caption": "a'),
    ("a.json", b'{"caption": "a dog"}'), ("a.json", b'[{"caption": 5}]'),
    ("a.json", b'[{"caption": ["a dog"]}]'),
])
def test_a_captions_file_without_captions_is_named(refuse, tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    refuse(tmp_path / name, "--captions", tmp_path / name)


def test_a_failure_leaves_the_old_files_whole(script, tell, tmp_path, monkeypatch):
    tell()
    before = files(tmp_path / "out")
    assert set(before) == {"stories.txt", "stories.jsonl"}

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(causal_lm, "to_text", interrupted)
    result = script("stories", "--caption", "a whale", "--savedir", tmp_path / "out", "--lm", GPT)
    assert result.code == 130 and result.err.splitlines()[-1].startswith("stopped")
    assert files(tmp_path / "out") == before


# ------------------------------------------------------------------------------------- stopped runs

# 18 stories in 5 batches.
MANY = ("--num_return_sequences", 3, "--batch_size", 4, "--max_tokens", 20)


@pytest.fixture
def stopped(script, tmp_path, monkeypatch):
    """stopped(n, arguments...) runs in the folder "stopped" and is interrupted in batch n.

    Returns the path of the .part file.
    """
    def run(n, *arguments):
        calls, write = itertools.count(), stories.write

        def interrupted(*batch):
            if next(calls) == n:
                raise KeyboardInterrupt
            return write(*batch)
        monkeypatch.setattr(stories, "write", interrupted)
        result = script("stories", "--caption", *CAPTIONS, "--savedir", tmp_path / "stopped",
                        "--lm", GPT, "--device", "cpu", *MANY, *arguments)
        assert result.code == 130
        monkeypatch.setattr(stories, "write", write)
        [part] = (tmp_path / "stopped").iterdir()
        return part
    return run


@pytest.fixture
def go_on(script, tmp_path, monkeypatch):
    """go_on(arguments...) runs in the folder "stopped" to the end.

    Returns the number of batches that it writes.
    """
    def run(*arguments):
        batches, write = [], stories.write

        def counting_write(*batch):
            batches.append(batch)
            return write(*batch)
        monkeypatch.setattr(stories, "write", counting_write)
        result = script("stories", "--caption", *CAPTIONS, "--savedir", tmp_path / "stopped",
                        "--lm", GPT, "--device", "cpu", *MANY, *arguments)
        assert result.code == 0, result.err
        monkeypatch.setattr(stories, "write", write)
        return len(batches)
    return run


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(stopped, go_on, tell, tmp_path, n):
    tell(*MANY)
    assert len(stopped(n).read_bytes().splitlines()) == n
    assert go_on() == 5 - n
    assert files(tmp_path / "stopped") == files(tmp_path / "out")


@pytest.mark.parametrize("damage, kept", [
    (lambda data: data[:-1], 2),
    (lambda data: data[:-20], 2),
    (lambda data: data + bytes(500), 3),
    (lambda data: data + b"[]\n", 3),
    (lambda data: data + b'["a", "b", "c", 4]\n', 3),
    (lambda data: data + b"[" * 100_000, 3),
    (lambda data: bytes(len(data)), 0),
    (lambda data: data + b"\xff\xfe\n", 3),
    (lambda data: b"", 0),
    (lambda data: data + seal("abcd")[:-1], 3),
    (lambda data: data.replace(b"red", b"rod", 1), 0),
    (lambda data: b"".join(line.split(b" ", 1)[1] for line in data.splitlines(True)), 0),
])
@pytest.mark.slow
def test_what_a_crash_left_of_a_batch_is_cut_off_and_written_again(
        stopped, go_on, tell, tmp_path, damage, kept):
    tell(*MANY)
    part = stopped(3)
    part.write_bytes(damage(part.read_bytes()))
    assert go_on() == 5 - kept
    assert files(tmp_path / "stopped") == files(tmp_path / "out")


def test_what_is_sealed_and_no_stories_of_this_run_is_named(script, stopped, tmp_path):
    """Anyone can make a seal."""
    part = stopped(1)
    whole = part.read_bytes()
    for record in ("abcd", ["a"], ["a", "b", "c", 4], ["a"] * 5, {}, 7):
        part.write_bytes(whole + seal(record))
        refuse_part(script, part, tmp_path)
    part.write_bytes(whole * 6)  # more batches than there are
    refuse_part(script, part, tmp_path)


def refuse_part(script, part, folder):
    result = script("stories", "--caption", *CAPTIONS, "--savedir", folder / "stopped",
                    "--lm", GPT, "--device", "cpu", *MANY)
    assert result.code == 2 and f"{part} does not hold stories of this run" in result.err
    assert [*part.parent.iterdir()] == [part]


@pytest.mark.parametrize("other", [
    ("--seed", 1), ("--temperature", 0.9), ("--top_p", 0.8), ("--prompt", "I saw {caption}"),
    ("--batch_size", 3), ("--max_tokens", 21), ("--num_return_sequences", 4)])
@pytest.mark.slow
def test_a_run_with_other_settings_takes_nothing_of_it(stopped, go_on, tell, tmp_path, other):
    tell(*MANY, *other)
    stopped(3)
    assert go_on(*other) == (6 if other[0] in ("--batch_size", "--num_return_sequences") else 5)
    assert files(tmp_path / "stopped") == files(tmp_path / "out")
