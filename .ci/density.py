"""How dense pixpro.py and train.py are to read; fails above the limits.

A token counts if it is code: no comment, docstring or line break.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"pixpro.py": (480, 3105), "train.py": (608, 5053)}  # lines, tokens
BREAKS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
# From Python 3.12 on an f-string is many tokens, from a start to an end. It counts as one.
F_START, F_END = (getattr(tokenize, f"FSTRING_{part}", None) for part in ("START", "END"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_lines(tree):
    """Numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def report(name):
    """Prints the figures of a file; returns its lines and tokens."""
    source = (ROOT / name).read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    docstrings = docstring_lines(tree)

    tokens = {}  # line: how many
    depth = 0  # in f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (token.type == F_START) - (token.type == F_END)
        if depth > 0 or token.type in BREAKS:
            continue
        if token.string and token.start[0] not in docstrings:
            tokens[token.start[0]] = tokens.get(token.start[0], 0) + 1
    count = sum(tokens.values())
    lengths = [len(lines[number - 1]) for number in tokens]

    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    inside = {n for node in functions for n in range(node.lineno, node.end_lineno)} - docstrings
    tuples = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple)]
    comments = [n for n, line in enumerate(lines, 1) if line.strip().startswith("#")]
    longest = max(functions, key=lambda node: node.end_lineno - node.lineno)
    figures = {
        "lines": len(lines),
        "tokens": count,
        "mean length of a code line": round(sum(lengths) / len(lengths)),
        "code lines over 100 columns": sum(length > 100 for length in lengths),
        "tokens on a line": round(count / len(tokens), 1),
        "lines with more than 30 tokens": sum(number > 30 for number in tokens.values()),
        "comprehensions": sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        "tuple assignments": len(tuples),
        "comments on a line of their own": len(set(comments) - docstrings),
        "blank lines inside functions": sum(not lines[number - 1].strip() for number in inside),
        "longest function": f"{longest.name}, {longest.end_lineno - longest.lineno + 1} lines",
    }
    print(name, *(f"{figure}: {value}" for figure, value in figures.items()), sep="\n  ")
    return len(lines), count


if __name__ == "__main__":
    found = {name: report(name) for name in LIMITS}
    above = [name for name in LIMITS if any(f > x for f, x in zip(found[name], LIMITS[name]))]
    sys.exit(f"above the limits of lines and tokens: {', '.join(above)}" if above else 0)
