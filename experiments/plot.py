"""Draws records: one line a method, with the spread over its seeds.

python -m experiments.plot RECORD... overlays any records, each a file or the
folder of a run. What is drawn comes from the records alone.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib

from .lab import flags
from .lab import launch
from .lab import plots
from .lab import record


@dataclasses.dataclass(frozen=True)
class Config(flags.BareConfig):
  """What `python -m experiments.plot` draws."""

  records: tuple[str, ...] = flags.positional('Records, or folders of runs.')
  x: tuple[str, ...] = flags.flag(('calls', 'seconds'), 'Fields on the x axes.')
  y: str = flags.flag('', "Field on the y axis; the first record's if empty.")
  log_x: bool = flags.flag(True, 'Logarithmic x axes.')
  log_y: bool = flags.flag(True, 'Logarithmic y axis.')
  output: str = flags.flag('records.png', 'The picture: .png, .pdf or .svg.')


def names(records: Sequence[str]) -> list[str]:
  """As much of the end of each folder's name as tells it from the others."""
  if len(records) == 1:
    return ['']
  paths = [pathlib.Path(path).absolute() for path in records]
  folders = [path.parent if path.is_file() else path for path in paths]
  for count in itertools.count(1):
    found = ['/'.join(path.parts[-count:]) for path in folders]
    if len(set(found)) == len(set(folders)):
      return found
  raise AssertionError  # The whole names are apart.


def main(config: Config) -> None:
  """Draws the records."""
  if pathlib.Path(config.output).suffix not in ('.png', '.pdf', '.svg'):
    raise flags.UserError(f'--output={config.output}: not .png, .pdf or .svg')
  folder = pathlib.Path(config.output).absolute().parent
  if not folder.is_dir():
    raise flags.UserError(f'--output={config.output}: no folder {folder}')
  loaded = [
    (name, *record.read(path))
    for name, path in zip(names(config.records), config.records, strict=True)
  ]
  y = config.y or loaded[0][1].get('show', 'value')
  plots.draw(
    loaded, config.output,
    x=config.x, y=y, log_x=config.log_x, log_y=config.log_y,
  )  # fmt: skip
  print(config.output)


if __name__ == '__main__':
  launch.run(main, Config)
