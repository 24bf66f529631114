"""Results folders in, report files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from explainer.errors import ConfigError, ExplainerError
from explainer.files import write_text
from explainer.report.html import report
from explainer.report.latex import latex
from explainer.report.tables import Results, all_tables, as_json, load_results, markdown, names_of, plain


def write(
    folders: Sequence[str | Path], out: Path, also: Sequence[str] = (), title: str = "Evaluation report", bootstrap: int = 1000
) -> list[Path]:
    """Write the report.

    Args:
        folders: results folders.
        out: file; its ending (.html, .md, .tex, .json) chooses the form.
        also: further forms (md, tex, json), written beside it.
        title: title of the report.
        bootstrap: resamples behind the intervals of differences.

    Returns:
        The files written.

    Raises:
        ConfigError: a folder that holds no results, or damaged ones.
    """
    results = [load_results(folder) for folder in folders]
    written = []
    for path in dict.fromkeys([out, *(out.with_suffix(f".{form}") for form in also)]):
        try:
            text = render(results, path.suffix, title, bootstrap)
        except ExplainerError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"the results in {', '.join(str(r.folder) for r in results)} cannot be shown ({type(error).__name__}: {str(error)[:200]}): "
                "a summary.json is damaged or of another version. Run the evaluation again; finished batches stay."
            ) from error
        write_text(path, text)
        written.append(path)
    return written


def render(results: Sequence[Results], suffix: str, title: str = "Evaluation report", bootstrap: int = 1000) -> str:
    """The report as text in the form of ``suffix``."""
    if suffix == ".html":
        return report(results, title, bootstrap)
    found = [(name, r, all_tables(r, bootstrap)) for name, r in zip(names_of(results), results, strict=True)]
    tables = [(name, t) for name, _, own in found for t in own]
    if suffix == ".json":
        return as_json(tables)
    if suffix == ".tex":
        return "% Needs \\usepackage{booktabs}.\n" + "\n".join(f"% {' '.join(data.split())}\n{latex(t)}" for data, t in tables)
    parts = [f"# {plain(title)}\n"]
    for name, r, own in found:
        parts.append(f"## {plain(name)}: {r.summary['images']} images of the {r.summary['split']} split\n")
        parts += [markdown(t) for t in own]
    return "\n".join(parts)
