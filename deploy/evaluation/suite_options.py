"""The options of `opdlm eval` that say what is evaluated, as problems that are ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.config.evaluation import AnswerFormat
from common.config.paths import expanded
from deploy.evaluation.asking import with_options_named
from deploy.evaluation.problems import SuiteProblems, load_problems, plain_problems, source_of
from deploy.evaluation.suites import SUITES, Suite, plain_suite


@dataclass(frozen=True)
class SuiteOptions:
    """As they were given; `suites` are NAME or NAME=SOURCE, `problems` a source of questions and answers."""

    suites: Sequence[str]
    folder: Path | None
    problems: str | None
    split: str | None
    subset: str | None
    question_field: str
    answer_field: str
    answer_format: AnswerFormat | None
    template: str | None
    shots: int
    count: int | None
    run_code: bool

    def check(self, score: bool = True) -> None:
        """What can be known before a file is read; `score`: the responses are scored here.

        Raises:
            ConfigError: nothing is to be evaluated, a suite is unknown, twice, or cannot be scored here.
        """
        if not self.suites and self.problems is None:
            raise ConfigError(f"--suite: give one of {', '.join(SUITES)}, NAME=FILE, or --problems FILE")
        names = [name for name, _ in self._named()]
        for name, source in self._named():
            if name not in SUITES and source is None:
                raise ConfigError(
                    f"--suite: {name!r} is unknown; choose {', '.join(SUITES)}, or give a file of questions and "
                    f"answers as {name}=FILE"
                )
            if names.count(name) > 1:
                raise ConfigError(f"--suite: {name!r} is given twice; leave one out")
            if score and name in SUITES:
                check_scorer(SUITES[name], self.run_code)
        for option, given in (("--split", self.split), ("--subset", self.subset)):
            if given and not self._has_plain():
                raise ConfigError(f"{option}: is for --problems; a suite's own are known")

    def load(self, tokenizer: Any, asked: dict[str, Any], positions: int) -> list[SuiteProblems]:
        """Raises ConfigError where rows cannot be read or used."""
        loaded = []
        for name, place in self._named():
            if name not in SUITES:
                loaded.append(self._plain(name, f"--suite {name}", str(place), tokenizer, asked, positions))
                continue
            suite = SUITES[name]
            if self.answer_format:
                suite = replace(suite, answer_formats=(self.answer_format,))
            loaded.append(
                load_problems(
                    suite,
                    source_of(suite, place, self.folder),
                    tokenizer,
                    asked=asked,
                    template=self.template,
                    shots=self.shots,
                    count=self.count,
                    positions=positions,
                )
            )
        if self.problems is not None:
            name = Path(self.problems).stem
            loaded.append(self._plain(name, "--problems", self.problems, tokenizer, asked, positions))
        return loaded

    def _plain(
        self, name: str, option: str, place: str, tokenizer: Any, asked: dict[str, Any], positions: int
    ) -> SuiteProblems:
        data = DataConfig(
            prompts=place,
            split=self.split,
            subset=self.subset,
            question_field=self.question_field,
            answer_field=self.answer_field,
            **asked,
        )
        suite = plain_suite(name)
        if self.answer_format:
            suite = replace(suite, answer_formats=(self.answer_format,))
        try:
            return plain_problems(suite, option, data, tokenizer, self.count, positions)
        except ConfigError as error:
            raise ConfigError(with_options_named(str(error))) from error

    def _named(self) -> list[tuple[str, str | None]]:
        pairs = [text.partition("=") for text in self.suites]
        return [(name, expanded(place) if sign else None) for name, sign, place in pairs]

    def _has_plain(self) -> bool:
        return self.problems is not None or any(name not in SUITES for name, _ in self._named())


def check_scorer(suite: Suite, run_code: bool) -> None:
    """Raises ConfigError where the packages of the scorer are missing, or it would run code without having been asked
    to."""
    if suite.scorer == "instructions":
        from deploy.evaluation.ifeval import check_installed

        check_installed()
    if suite.scorer == "code" and not run_code:
        raise ConfigError(
            f"--suite {suite.name}: runs the programs that the model writes on this machine; say --run-code if that is "
            "what you want (docs/evaluation.md says how they are kept in)"
        )
