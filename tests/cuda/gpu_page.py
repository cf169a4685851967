"""What `make gpu-report` found, for programs and for people."""

import json


def write(folder, results, seconds, dry):
    """report.json with everything, report.md for people."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"dry run": bool(dry), "seconds": seconds, "results": results}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["# GPU report", ""]
    if dry:
        lines += [
            "**A dry run on emulated kernels: no device was there, no time means anything.**",
            "",
        ]
    lines += ["| part | passed | failed | not run | seconds |", "|---|---|---|---|---|"]
    for part, taken in seconds.items():
        own = [r for r in results if r["part"] == part]
        skipped = sum("skipped" in r for r in own)
        failed = sum(not r["ok"] for r in own)
        passed = sum(r["ok"] and "skipped" not in r for r in own)
        lines.append(f"| {part} | {passed} | {failed} | {skipped} | {taken:.0f} |")
    lines += ["", "## Machine", ""]
    lines += [
        f"- {r['name']}: {r['value']}" for r in results if r["part"] == "machine" and "value" in r
    ]
    failures = [r for r in results if not r["ok"]]
    lines += ["", "## What failed", ""] + ([] if failures else ["Nothing."])
    for r in failures:
        lines += [f"- {r['part']}, {r['name']}: {describe(r)}"]
    lines += ["", "## Parity", "", "Largest error in roundings of the dtype, ours and torch.nn's, against float64.", "",
              "| case | by | ours | torch.nn | |", "|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        if r["part"] == "parity" and "roundings" in r:
            verdict = "" if r["ok"] else "FAILED"
            lines.append(
                f"| {r['name']} | {r['by']} | {r['roundings']} | {r['stocks']} | {verdict} |"
            )
    lines += ["", "## Generation", "", "| case | by | differing characters |", "|---|---|---|"]
    for r in results:
        if r["part"] == "generation" and "differing" in r:
            lines.append(f"| {r['name']} | {r['by']} | {r['differing']:.2%} |")
    lines += ["", "## Beside cuDNN", "", "Milliseconds of 128 steps, 128 inputs, one layer.", "",
              "| case | forward: cuDNN | ours | ratio | both: cuDNN | ours | ratio |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        if r["part"] == "bench" and "ours_both_ms" in r:
            cells = [r["name"]]
            for kind in ("forward", "both"):
                cudnn, ours = r[f"cudnn_{kind}_ms"], r[f"ours_{kind}_ms"]
                cells += [f"{cudnn:.3f}", f"{ours:.3f}", f"{cudnn / ours:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def describe(result):
    if "error" in result:
        return "`" + result["error"].strip().replace("\n", " / ").replace("`", "'") + "`"
    known = ("by", "roundings", "stocks", "differing")
    return ", ".join(f"{name} {result[name]}" for name in known if name in result)
