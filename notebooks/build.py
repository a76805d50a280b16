"""Executes the text twins and writes the notebooks with their pictures.

python -m notebooks.build [NAME...]
"""

import pathlib
import sys

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent
NAMES = ('logistic_regression', 'softmax_regression')


def execute(name: str) -> nbformat.NotebookNode:
  """Runs a text twin from the project's root.

  Args:
    name: The notebook's name, without an ending.

  Returns:
    The notebook with its outputs.

  Raises:
    nbclient.exceptions.CellExecutionError: A cell failed.
  """
  notebook = jupytext.read(FOLDER / f'{name}.py')
  # Cells are numbered, so that building twice gives one file.
  for i, cell in enumerate(notebook.cells):
    cell['id'] = str(i)
  resources = {'metadata': {'path': str(FOLDER.parent)}}
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name='python3', resources=resources,
    record_timing=False,
  )  # fmt: skip
  return client.execute()


def main(names: list[str]) -> None:
  """Builds the notebooks named, or all."""
  for name in names or NAMES:
    path = FOLDER / f'{name}.ipynb'
    nbformat.write(execute(name), path)
    print(path)


if __name__ == '__main__':
  main(sys.argv[1:])
