#!/usr/bin/env python3
"""Turn benchmark lines (standard input) into the rows of docs/BENCHMARKS.md."""

import json
import sys

print("| bench | metric | value | baseline | ratio |")
print("|---|---|---|---|---|")
for line in sys.stdin:
    row = json.loads(line)
    base = row["baseline"]
    ratio = f"{row['ratio']:.2f}"
    value = f"{row['value']:g} {row['unit']}"
    print(f"| {row['bench']} | `{row['metric']}` | {value} | {base['name']} {base['value']:g} | {ratio} |")
