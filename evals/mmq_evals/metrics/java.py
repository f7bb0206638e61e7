# SPDX-License-Identifier: Apache-2.0
"""METEOR, SPICE and the Penn Treebank tokenizer: the Java programs that pycocoevalcap carries.

Java ends a line at characters that Python keeps, prints numbers as the locale wants them and reads
bytes as the locale says; one such character would shift every later caption without an error. So
text is sanitized, language and encoding are fixed on the command line, and every answer is checked
for its form and its number of lines.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.metrics.caption import CaptionScores, FloatArray
from mmq_evals.metrics.inputs import Hypotheses, References, tokenize_pairs
from mmq_evals.metrics.tokenize import Tokens, sanitize

_SETTINGS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    # Since Java 18 the standard streams follow the locale whatever file.encoding says.
    "-Dstdout.encoding=UTF-8",
    "-Dstderr.encoding=UTF-8",
)
# SPICE's serializer looks into private fields, which Java 16 and later forbid unless opened.
_SPICE_OPEN = tuple(
    f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in ("lang", "math", "util", "text")
)
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SPICE_SOURCE = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"

# Tokens that the COCO evaluation drops after tokenizing. Brackets come in lower case and so stay.
_DROPPED = frozenset(
    "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()  # noqa: SIM905
)
_METEOR_STATISTICS = 23
# English, as METEOR 1.5 ships it: weights of exact, stem, synonym and paraphrase matches, then of
# precision, of fragmentation (exponent, factor), and of content words against function words.
_METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA, _METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class MeteorScores(CaptionScores):
    """METEOR's aggregate and values per image, with the ``statistics`` of every image in that
    order: lengths, function words, and matches; see `meteor_from_statistics`."""

    statistics: tuple[tuple[float, ...], ...]


class JavaUnavailableError(EvalError):
    """A Java program cannot run here: no Java, no package, no models, or it died."""


def find_java() -> str:
    """Path of the Java program: of ``JAVA_HOME`` if that is set, else of the PATH.

    Raises:
        JavaUnavailableError: there is none; the message says what can be installed.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home) / "bin") if home else None)
    if java is None:
        where = f"{home}/bin (JAVA_HOME)" if home else "the PATH"
        raise JavaUnavailableError(
            f"Java: expected the program java on {where}, found none; METEOR, SPICE and the "
            "tokenizer ptb need a Java runtime, such as Debian's default-jre-headless"
        )
    return java


@lru_cache(maxsize=8)
def java_version(java: str) -> str:
    """First line of ``java -version``; asked once a program.

    Raises:
        JavaUnavailableError: the program does not run.
    """
    try:
        shown = subprocess.run([java, "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise JavaUnavailableError(f"Java: {java} does not run: {error}") from None
    # The first line may announce options taken from the environment.
    lines = [line for line in (shown.stderr + shown.stdout).splitlines() if "version" in line]
    return lines[0] if lines else "prints no version"


def tokenize_ptb(texts: Sequence[str]) -> list[Tokens]:
    """Tokens of every text by Stanford's tokenizer 3.4.1 as the COCO caption evaluation uses it.

    Raises:
        JavaUnavailableError: Java or pycocoevalcap is missing.
        EvalError: the program gives another number of lines than it got.
    """
    if not texts:
        return []
    folder = _package() / "tokenizer"
    with tempfile.TemporaryDirectory(prefix="mmq-ptb-") as temporary:
        file = Path(temporary) / "captions.txt"
        file.write_bytes("".join(f"{_line(text)}\n" for text in texts).encode())
        program = ["-cp", str(folder / "stanford-corenlp-3.4.1.jar")]
        program += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        output = _run("tokenizer ptb", [*program, str(file)])
    lines = output.split("\n")
    if lines.pop() != "" or len(lines) != len(texts):
        raise EvalError(f"tokenizer ptb: expected {len(texts)} lines from Java, got {len(lines)}")
    return [
        tuple(token for token in line.rstrip("\r").split(" ") if token and token not in _DROPPED)
        for line in lines
    ]


def meteor(
    references: References, hypotheses: Hypotheses, *, tokenizer: str = "py", heap: str = "2G"
) -> MeteorScores:
    """METEOR 1.5 (Denkowski and Lavie 2014), English, normalised, as pycocoevalcap runs it.

    The corpus value is the program's aggregate, computed from summed statistics, and not the mean
    of the values per image.

    Args:
        heap: the most memory Java may take, as its option -Xmx wants it.

    Raises:
        JavaUnavailableError: Java or pycocoevalcap is missing, or the program dies.
        EvalError: ids differ, an image has no reference, or the program answers out of form.
    """
    refs, hyps = tokenize_pairs(references, hypotheses, tokenizer)
    command = [find_java(), *_SETTINGS, f"-Xmx{heap}", "-jar", str(_meteor_jar())]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with _talk(command) as ask:
        statistics = []
        for image_id, hypothesis in hyps.items():
            texts = [_field(tokens) for tokens in (*refs[image_id], hypothesis)]
            answer = ask(f"SCORE ||| {' ||| '.join(texts)}")
            if len(answer.split()) != _METEOR_STATISTICS:
                raise EvalError(
                    f"METEOR: expected {_METEOR_STATISTICS} statistics of image {image_id!r}, "
                    f"got {answer!r}"
                )
            statistics.append(answer)
        values = [_number(ask(f"EVAL ||| {' ||| '.join(statistics)}"))]
        values += [_number(ask(None)) for _ in hyps]
    # The aggregate follows the values per image.
    per_image = dict(zip(hyps, values, strict=False))
    columns = tuple(_whole(list(map(_number, line.split()))) for line in statistics)
    return MeteorScores(values[-1], per_image, columns)


def _whole(row: list[float]) -> tuple[float, ...]:
    """Quirk: a hypothesis that is the reference, in one chunk, adds none to the corpus."""
    identical = row[20] == 1.0 and row[21:23] == row[0:2]
    return (*row[:20], 0.0, *row[21:]) if identical else tuple(row)


def meteor_from_statistics(statistics: FloatArray) -> FloatArray:
    """METEOR, shape (...), of summed statistics, shape (..., 23): what Java computes of them.

    In order: words of hypothesis and reference; function words of both; for exact, stem, synonym
    and paraphrase matches the matched content words of both and the matched function words of both;
    chunks (none where both are one); matched words of both (Denkowski and Lavie 2014, section 2).
    """
    matches = statistics[..., 4:20].reshape((*statistics.shape[:-1], 4, 4))
    content = np.einsum("...ks,k->...s", matches[..., 0:2], _METEOR_WEIGHTS)
    function = np.einsum("...ks,k->...s", matches[..., 2:4], _METEOR_WEIGHTS)
    matched = _METEOR_DELTA * content + (1.0 - _METEOR_DELTA) * function
    words, function_words = statistics[..., 0:2], statistics[..., 2:4]
    total = _METEOR_DELTA * (words - function_words) + (1.0 - _METEOR_DELTA) * function_words
    share = np.divide(matched, total, out=np.zeros_like(matched), where=total > 0.0)
    precision, recall = share[..., 0], share[..., 1]
    mean = _METEOR_ALPHA * precision + (1.0 - _METEOR_ALPHA) * recall
    f = np.divide(precision * recall, mean, out=np.zeros_like(mean), where=mean > 0.0)
    chunks, both = statistics[..., 20], statistics[..., 21:23]
    found = both.sum(axis=-1) / 2.0
    fragments = np.divide(chunks, found, out=np.zeros_like(chunks), where=found > 0.0)
    return np.asarray(f * (1.0 - _METEOR_GAMMA * fragments**_METEOR_BETA))


def spice(
    references: References,
    hypotheses: Hypotheses,
    *,
    tokenizer: str = "py",
    heap: str = "8G",
    cache: Path | None = None,
) -> CaptionScores:
    """SPICE 1.0 (Anderson et al. 2016): F-score of scene graph tuples, mean over images.

    An image for which the program gives no number (no tuple in hypothesis and references) has 0.

    Args:
        heap: as for `meteor`.
        cache: folder for parses of captions seen before. It needs a native database that some
            machines lack; by default nothing is kept.

    Raises:
        JavaUnavailableError: as `meteor`, or the parser models, which pycocoevalcap does not carry,
            are not in its folder. Nothing is fetched.
        EvalError: as `meteor`.
    """
    refs, hyps = tokenize_pairs(references, hypotheses, tokenizer)
    folder = _package() / "spice"
    for name in _SPICE_MODELS:
        if not (folder / "lib" / name).is_file():
            raise JavaUnavailableError(
                f"SPICE: expected {folder / 'lib' / name}; it is published in {_SPICE_SOURCE}"
            )
    ids = list(hyps)
    data = [
        {
            "image_id": index,
            "test": " ".join(hyps[image_id]),
            "refs": [" ".join(tokens) for tokens in refs[image_id]],
        }
        for index, image_id in enumerate(ids)
    ]
    with tempfile.TemporaryDirectory(prefix="mmq-spice-") as temporary:
        given, taken = Path(temporary) / "in.json", Path(temporary) / "out.json"
        # ASCII JSON: no character of a caption can end a line or meet an encoding.
        given.write_text(json.dumps(data), encoding="ascii")
        program = [f"-Xmx{heap}", *_SPICE_OPEN, "-jar", str(folder / "spice-1.0.jar"), str(given)]
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            program += ["-cache", str(cache.absolute())]
        _run("SPICE", [*program, "-out", str(taken), "-subset", "-silent"])
        scores = _spice_scores(taken)
    if scores.keys() != set(range(len(ids))):
        raise EvalError(f"SPICE: expected {len(ids)} images in the answer, got {len(scores)}")
    per_image = {image_id: scores[index] for index, image_id in enumerate(ids)}
    return CaptionScores(math.fsum(per_image.values()) / len(per_image), per_image)


def _spice_scores(file: Path) -> dict[int, float]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        values = {int(row["image_id"]): row["scores"]["All"]["f"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JavaUnavailableError(
            f"SPICE: unavailable, its answer is out of form: {error!r}"
        ) from None
    return {
        key: float(value) if isinstance(value, float | int) and math.isfinite(value) else 0.0
        for key, value in values.items()
    }


# ---- programs ------------------------------------------------------------------------------------


def _package() -> Path:
    """Folder of pycocoevalcap, whose modules are not run."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise JavaUnavailableError(
            "pycocoevalcap: expected the package, which carries the Java programs; "
            "install mmq[java]"
        )
    return Path(next(iter(found.submodule_search_locations)))


def _meteor_jar() -> Path:
    folder = _package() / "meteor"
    for name in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
        if not (folder / name).is_file():
            raise JavaUnavailableError(
                f"METEOR: expected {folder / name}, a file of pycocoevalcap 1.2"
            )
    return folder / "meteor-1.5.jar"


def _run(name: str, arguments: Sequence[str]) -> str:
    """Standard output of Java; EvalError with the end of its complaints where it fails."""
    command = [find_java(), *_SETTINGS, *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise JavaUnavailableError(
            f"{name}: unavailable, {_complaint(done.returncode, done.stderr)}"
        )
    return done.stdout.decode("utf-8", errors="replace")


def _complaint(code: int | None, stderr: bytes) -> str:
    # The first line says most, but for the options taken from the environment and for warnings.
    shown = [
        line
        for line in stderr.decode("utf-8", errors="replace").splitlines()
        if line.strip() and not line.startswith(("Picked up", "WARNING", "\tat "))
    ]
    return f"Java ended with {code}: {' '.join(shown[:2])[:300]}"


class _Conversation:
    """Lines to and from a running program."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self._process, self._stderr = process, stderr

    def __call__(self, line: str | None) -> str:
        """Send ``line``, if there is one, and return the next line of the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        answer = b""
        try:
            if line is not None:
                stdin.write(f"{line}\n".encode())
                stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            pass
        if not answer.endswith(b"\n"):
            code = self._process.wait()
            self._stderr.seek(0)
            raise JavaUnavailableError(
                f"METEOR: unavailable, {_complaint(code, self._stderr.read())}"
            )
        return answer.decode("utf-8", errors="replace").strip()


@contextmanager
def _talk(command: Sequence[str]) -> Iterator[_Conversation]:
    # Complaints go to a file: a pipe that nobody reads would fill up and stop the program.
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        )
        try:
            yield _Conversation(process, stderr)
        finally:
            process.kill()
            process.communicate()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise EvalError(f"METEOR: expected a number, got {text!r}") from None


def _line(text: str) -> str:
    """One line of text that UTF-8 can hold."""
    return _SURROGATE.sub("\ufffd", sanitize(text))


def _field(tokens: Tokens) -> str:
    """Tokens as one field of METEOR's protocol, which separates fields with three bars."""
    return _line(" ".join(tokens)).replace("|||", " ")
