"""Write the tables of recipes.md and weights.md anew, from the heads of the recipes and from the manifest.

``python docs/tables.py``; a test fails where a page is behind.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from foveal.configs.schema import RECIPES, recipe_names
from foveal.weights.manifest import checkpoints

HERE = Path(__file__).parent
FAMILIES = {
    "nat": "NAT, DiNAT, DiNAT_s, isotropic",
    "halonet": "HaloNet, timm's hybrids",
    "maxvit": "MaxViT",
    "overlock": "OverLoCK",
    "ascan": "AsCAN",
    "care": "CARE",
    "a3fpn": "A3-FPN",
}


def head(recipe: str) -> dict[str, str]:
    """What a recipe says of itself: Command, Hardware, Time, Score, Status."""
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    said: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if match := re.match(r"# ([A-Z][a-z]+): +(.+)", line):
            key, said[match[1]] = match[1], match[2]
        elif key and (match := re.match(r"#  +(.+)", line)):  # goes on, indented
            said[key] += f" {match[1]}"
        else:
            key = ""
    return said


def measured() -> str:
    rows = []
    for name in recipe_names():
        said = head(name)
        if said["Status"].startswith("measured"):
            rows.append(f"| `{name}` | {said['Score']} | {said['Time']} | {said['Hardware']} |")
    return "\n".join(["| recipe | score | time | on |", "|---|---|---|---|", *rows])


def others(task: str) -> str:
    rows = []
    for name in recipe_names():
        said = head(name)
        if name.startswith(f"{task}/") and not said["Status"].startswith("measured"):
            source = "published" if said["Status"].startswith("published figure") else said["Status"].partition("; ")[2]
            score = re.sub(r":? foveal evaluate .*", "", said["Score"])
            rows.append(f"| `{name.partition('/')[2]}` | {score} | {source or 'not run'} |")
    return "\n".join(["| recipe | score that is aimed at | whose |", "|---|---|---|", *rows])


def families() -> str:
    rows = []
    for family, title in FAMILIES.items():
        of = [each for each in checkpoints().values() if each.family == family]
        if not of:
            rows.append(f"| {title} | none published | | |")
            continue
        tasks = ", ".join(f"{count} {task}" for task, count in Counter(each.task for each in of).items())
        rows.append(f"| {title} | {tasks} | {of[0].code_licence} | {of[0].weights_licence} |")
    total = len(checkpoints())
    table = ["| family | files | licence of the code | licence of the weights |", "|---|---|---|---|", *rows]
    return "\n".join([*table, f"| all | {total} | | |"])


TABLES = {
    "recipes.md": {
        "measured": measured,
        **{task: lambda t=task: others(t) for task in ("classify", "detect", "segment")},
    },
    "weights.md": {"families": families},
}


def filled(page: str) -> str:
    """A page with its tables as they should be; each stands between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    text = (HERE / page).read_text(encoding="utf-8")
    for name, make in TABLES[page].items():
        pattern, table = rf"(?<=<!-- table: {name} -->\n).*?(?=<!-- end -->)", make()
        text, count = re.subn(pattern, lambda _, table=table: f"\n{table}\n\n", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} has {count} places for the table {name}, not one")
    return text


if __name__ == "__main__":
    for page in TABLES:
        temporary = HERE / f"{page}.new"
        temporary.write_text(filled(page), encoding="utf-8")
        os.replace(temporary, HERE / page)
        print(HERE / page)
