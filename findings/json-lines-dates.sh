#!/usr/bin/env bash
# datasets 5.2.0: text in a .jsonl file comes back as datetime objects if every value of the column looks like a date.
# Guess: JSON has no dates, so a string stays a string (a .csv file may be guessed at; and numbers in strings do stay strings).
# Seen 2026-11-28: {"text": "2020-01-01"} -> datetime.datetime(2020, 1, 1, 0, 0), type timestamp[s]; one value more that is no
#   date, and all stay text.
source "$(dirname "$0")/environment"
packages datasets==5.2.0 pyarrow==26.0.1
check <<'PY'
import json
from pathlib import Path

from datasets import load_dataset

def first(name, *texts):
    Path(name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return load_dataset("json", data_files=name, split="train")[0]["text"]

seen = [first("dates.jsonl", "2020-01-01", "2021-05-06"), first("mixed.jsonl", "2020-01-01", "no date"), first("numbers.jsonl", "1", "2")]
print(seen)
assert type(seen[0]).__name__ == "datetime" and seen[1:] == ["2020-01-01", "1"]
PY
