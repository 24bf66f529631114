"""Tables for papers, as LaTeX."""

from __future__ import annotations

from explainer.report.tables import Table


def latex(table: Table) -> str:
    """As a LaTeX ``table`` (needs booktabs)."""
    arrows = {True: r" $\uparrow$", False: r" $\downarrow$", None: ""}
    head = [_escape_latex(table.first), *(_escape_latex(h) + arrows[d] for h, d in zip(table.header, table.directions, strict=True))]
    lines = []
    for label, cells in table.lines:
        texts = ["--" if c is None else rf"\textbf{{{_escape_latex(c.text())}}}" if c.best else _escape_latex(c.text()) for c in cells]
        lines.append(" & ".join([_escape_latex(label), *texts]) + r" \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape_latex(table.title)}. {_escape_latex(table.caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(table.header)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escape_latex(text: str) -> str:
    plain = {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"$<$",
        ">": r"$>$",
        "∞": r"$\infty$",
    }
    return "".join(plain.get(c, c) for c in text)
