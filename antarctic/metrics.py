"""Scores that compare words: BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE of pycocoevalcap, with the
tokenizers of COCO's evaluation and of NLTK, and word counts.

Loading pycocoevalcap and NLTK takes half a second, so only the functions that need them import
them.
"""

import math
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from antarctic.distributed import warn
from antarctic.errors import InputError

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
BY_WORDS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr-D", "SPICE")
PATIENCE = 600  # seconds that Java may be silent; METEOR takes 10 of a processor to begin
# What becomes Java, and is killed with its parent. Popen's preexec_fn is not safe beside threads.
BECOME = (sys.executable, "-ISc", """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # else it has died already
    os.execvp(sys.argv[2], sys.argv[2:])
""")
TOKENIZERS = {"ptb": "Java's PTBTokenizer, as COCO's evaluation",
              "treebank": "NLTK's TreebankWordTokenizer, without Java"}


# --------------------------------------------------------------------------------------------- Java

class Java(subprocess.Popen):
    """A Java program with pipes as its standard input and output. It ends with this process, also
    where that is killed (on Linux; elsewhere it ends where it reads the end of its input), and is
    killed once it was silent for `patience` seconds (default: PATIENCE), since a pipe has no limit.

    Attributes: silent, seconds, which whoever reads an answer sets to 0; late, whether it was
    killed for its silence.
    """

    def __init__(self, *arguments, stderr, patience=None):
        command = [*BECOME, str(os.getpid())] if sys.platform == "linux" else []
        super().__init__([*command, "java", *arguments], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=stderr)
        self.patience, self.silent, self.late = patience or PATIENCE, 0, False
        self.ended = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        # Seconds are counted, and no clock is read, which goes on while a shell holds both.
        while not self.ended.wait(1):
            self.silent += 1
            if self.silent > self.patience:
                self.late = True
                self.kill()
                return


def has_java():
    """Whether Java runs. On some systems the command `java` only prints where to get Java."""
    try:
        with java_process("-version", stderr=subprocess.DEVNULL) as process:
            process.communicate()
            if process.late:
                warn(f"`java -version` gave no answer for {minutes(PATIENCE)}, so Java is not used")
            return process.returncode == 0
    except OSError:
        return False


def minutes(seconds):
    return f"{seconds / 60:.3g} minutes"


@contextmanager
def java_process(*arguments, **options):
    """Runs Java, see there.

    It is killed and waited for in the end, whatever happens: subprocess.run leaves a zombie where
    Ctrl-C comes.
    """
    process = Java(*arguments, **options)
    try:
        yield process
    finally:
        process.ended.set()
        process.kill()  # first, as closing its input would wait until it reads what is left
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


@contextmanager
def java_program(*arguments):
    """Runs a Java program that answers lines of text. Yields ask(line), which returns its answer,
    and last(line), which also ends its input and returns all that it still answers, a list. Both
    raise SubprocessError where it is silent for too long, and ask where it has ended, with the last
    line of what it complains of.
    """
    # A pipe of complaints that nobody reads would fill up.
    with (tempfile.TemporaryFile() as complaints,
          java_process(*arguments, stderr=complaints) as process):
        def send(line):
            with suppress(BrokenPipeError):  # it has ended: there is no answer
                process.stdin.write(f"{line}\n".encode(errors="replace"))
                process.stdin.flush()

        def ask(line):
            send(line)
            answer = process.stdout.readline()
            process.silent = 0
            if not answer:
                refuse_late()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                complaints.seek(0)
                raise subprocess.SubprocessError(f"Java ended{last_line(complaints.read(10_000))}")
            return answer.decode(errors="replace").strip()

        def last(line):
            send(line)
            with suppress(BrokenPipeError):
                process.stdin.close()
            answers = []
            for answer in process.stdout:
                process.silent = 0
                answers.append(answer)
            refuse_late()
            return b"".join(answers).decode(errors="replace").split("\n")[:-1]

        def refuse_late():
            if process.late:
                raise subprocess.SubprocessError(
                    f"Java gave METEOR no answer for {minutes(PATIENCE)}; rerun the same command "
                    "where it gets a processor and 2 GB of memory")

        yield ask, last


def last_line(complaints):
    """The last line of what Java complains of (bytes), to end a sentence with: ": ..." or ""."""
    lines = complaints.decode(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def missing_corenlp():
    """Why SPICE lacks its parser, a text; empty where the parser is installed. pycocoevalcap would
    download it."""
    from pycocoevalcap.spice import get_stanford_models
    folder = Path(get_stanford_models.__file__).parent / get_stanford_models.SPICELIB
    names = [f"{get_stanford_models.JAR}{end}.jar" for end in ("", "-models")]
    if all((folder / name).is_file() for name in names):
        return ""
    return f"Stanford CoreNLP ({' and '.join(names)}) is not in {folder}"


# --------------------------------------------------------------------------------------- tokenizers

def tokenize(texts, tokenizer):
    """Texts as COCO's evaluation reads them: lower-cased tokens, separated by a space, without
    punctuation. texts: N texts without line breaks. tokenizer: one of TOKENIZERS. Returns N texts.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS
    lines = ptb_tokens(texts) if tokenizer == "ptb" else treebank_tokens(texts)
    return [" ".join(token for token in line.split(" ") if token not in PUNCTUATIONS)
            for line in lines]


def ptb_tokens(texts):
    """Texts with tokens separated by Java's tokenizer. Raises InputError where it fails.

    The program is pycocoevalcap's. Its wrapper is not used: it writes into the package's folder and
    hides failures.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = "".join(text + "\n" for text in texts).encode(errors="replace")
    patience = PATIENCE + len(text) // 10_000  # it takes a hundredth of this
    with java_process("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
                      "-lowerCase", stderr=subprocess.PIPE, patience=patience) as process:
        output, complaints = process.communicate(text)
    if process.late:
        raise InputError(f"Java's tokenizer has not ended after {minutes(patience)}; try "
                         "--tokenizer treebank")
    lines = output.decode(errors="replace").split("\n")[:-1]
    if len(lines) != len(texts):
        raise InputError(f"Java's tokenizer gave {len(lines)} lines for {len(texts)} texts"
                         f"{last_line(complaints)}; try --tokenizer treebank")
    return lines


def treebank_tokens(texts):
    """Texts with tokens separated by NLTK's tokenizer, in the form of Java's tokenizer."""
    from nltk.tokenize import TreebankWordTokenizer
    split, lines = TreebankWordTokenizer().tokenize, []
    for text in tqdm(texts, "tokenizing", unit="text"):
        tokens = split(text.replace("|", " | "), convert_parentheses=True)  # METEOR uses |||
        lines.append(" ".join(tokens).lower())
    return lines


# ------------------------------------------------------------------------------------------ metrics
# Each takes {i: references of caption i} and {i: [caption i]} and returns a list of numbers.

def bleu(references, captions):
    from pycocoevalcap.bleu.bleu import Bleu
    return Bleu(4).compute_score(references, captions, verbose=0)[0]


def meteor(references, captions):
    """METEOR 1.5, by Java.

    The program is pycocoevalcap's. Its wrapper is not used: where a run is stopped, it waits for
    ever for a lock that it holds itself. Raises SubprocessError or ValueError where Java fails.
    """
    from pycocoevalcap.meteor import meteor as wrapper
    jar = Path(wrapper.__file__).with_name(wrapper.METEOR_JAR)
    with java_program("-jar", "-Xmx2G", jar, "-", "-", "-stdio", "-l", "en", "-norm") as program:
        ask, last = program
        counts = []  # of what matches in each caption
        for i, [caption] in captions.items():
            caption = caption.replace("|||", "").replace("  ", " ")
            counts.append(ask(" ||| ".join(["SCORE", *references[i], caption])))
        *singles, score = last(" ||| ".join(["EVAL", *counts])) or [""]
    if len(singles) != len(captions):
        raise ValueError(f"Java gave {len(singles)} scores of {len(captions)} captions")
    return [float(score)]


def rouge_l(references, captions):
    from pycocoevalcap.rouge.rouge import Rouge
    return [Rouge().compute_score(references, captions)[0]]


def cider_d(references, captions):
    """CIDEr-D (https://arxiv.org/abs/1411.5726), 0 to 10, which pycocoevalcap calls Cider. The
    weight of an n-gram is its rarity in these references."""
    from pycocoevalcap.cider.cider import Cider
    return [Cider().compute_score(references, captions)[0]]


def spice(references, captions):
    from pycocoevalcap.spice import spice as wrapper
    with tempfile.TemporaryDirectory() as folder:
        wrapper.TEMP_DIR = folder  # in place of one in the package, where a stopped run left files
        return [wrapper.Spice().compute_score(references, captions)[0]]


SCORERS = {BLEU: bleu, ("METEOR",): meteor, ("ROUGE-L",): rouge_l, ("CIDEr-D",): cider_d,
           ("SPICE",): spice}


def word_scores(captions, references, left_out):
    """Returns ({metric: score}, {metric: reason} of the metrics that failed).

    captions: N tokenized texts. references: N lists of tokenized texts. left_out: metrics to skip.
    Each metric runs alone, because COCOEvalCap.evaluate would make SPICE download its parts first.
    """
    captions = {i: [text] for i, text in enumerate(captions)}
    references = dict(enumerate(references))
    scores, failed = {}, {}
    wanted = [names for names in SCORERS if names[0] not in left_out]
    for names in tqdm(wanted, "scoring", unit="metric"):
        try:
            values = [float(value) for value in SCORERS[names](references, captions)]
            if not all(map(math.isfinite, values)):
                raise ValueError(f"it gave {values}")
            scores |= zip(names, values)
        except (OSError, LookupError, TypeError, ValueError,
                subprocess.SubprocessError) as error:  # mostly from Java
            reason = f"its scorer failed ({type(error).__name__}: {error})"
            failed |= dict.fromkeys(names, reason)
    return scores, failed


def word_statistics(captions, train):
    """Returns ({metric: number} of distinct captions, novel words and mean length, {novel word:
    count}).

    captions, train: lists of tokenized texts. The share of novel words counts each occurrence, so
    it does not grow with the number of captions.
    """
    words = Counter(word for caption in captions for word in caption.split())
    scores = {"distinct captions": len(set(captions)) / len(captions),
              "mean length": words.total() / len(captions)}
    known = {word for caption in train for word in caption.split()}
    novel = {word: n for word, n in words.most_common() if word not in known}
    if train:
        scores["novel words"] = sum(novel.values()) / max(1, words.total())
    return scores, novel
