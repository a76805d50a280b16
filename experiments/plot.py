"""Draws records: one line a method, with the spread over its seeds.

python -m experiments.plot RECORD... overlays any records, each a file or the
folder of a run. What is drawn comes from the records alone.
"""

import dataclasses
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


def main(config: Config) -> None:
  """Draws the records."""
  if pathlib.Path(config.output).suffix not in ('.png', '.pdf', '.svg'):
    raise flags.UserError(f'--output={config.output}: not .png, .pdf or .svg')
  folder = pathlib.Path(config.output).absolute().parent
  if not folder.is_dir():
    raise flags.UserError(f'--output={config.output}: no folder {folder}')
  several = len(config.records) > 1
  loaded = []
  for path in config.records:
    header, rows = record.read(path)
    label = pathlib.Path(path)
    name = label.parent.name if label.is_file() else label.name
    loaded.append((name if several else '', header, rows))
  y = config.y or loaded[0][1].get('show', 'value')
  plots.draw(
    loaded, config.output,
    x=config.x, y=y, log_x=config.log_x, log_y=config.log_y,
  )  # fmt: skip
  print(config.output)


if __name__ == '__main__':
  launch.run(main, Config)
