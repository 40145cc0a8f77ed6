"""The comparison on photographs: folders of classes, captions of their names, and the teacher of recipes/foreign-teacher."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import inputs
import plan

FOREIGN = Path(__file__).resolve().parent.parent / "foreign-teacher"


class Photographs(inputs.Inputs):
    """What students of photographs are trained, tuned and reported on, in one work directory."""

    sets = ("tune-photographs-classes", "report-photographs-classes")
    probe_name = "report photographs probe"

    def __init__(self, work: Path, train: Path, tune: Path, report: Path, drawings: plan.Log) -> None:
        """Take three folders, each of a folder per class; the first gets captions of its classes' names.

        Args:
            drawings: The log of the students of drawings, which decides the weights.
        """
        super().__init__(work)
        self._drawings = drawings
        self.teacher = FOREIGN / "teacher"
        self.pairs = work / "captions.csv"
        self.probe_train, self.probe_test = train.resolve(), report.resolve()
        self._folders = dict(zip(self.sets, (tune.resolve(), report.resolve()), strict=True))

    def prepare(self) -> None:
        """Build the teacher, write captions, copy the sets under their names, and embed what is trained on."""
        subprocess.run(["bash", FOREIGN / "teacher.sh"], check=True)
        (self.work / "sets").mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, FOREIGN / "captions.py", self.probe_train, self.pairs], check=True)
        for name, folder in self._folders.items():
            copy = self.work / "sets" / name
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        inputs.clipcid("embed", self.pairs, "--model", self.teacher, "--work", self.work)

    def probed(self, log: plan.Log) -> list[plan.Setting]:
        """Return the settings whose students get a linear probe."""
        return [plan.best(plan.photograph_students(name, self._drawings), log) for name in plan.SCALED]
