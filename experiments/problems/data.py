"""Data sets: bundled, from scikit-learn, from files, or from OpenML by name."""

import bz2
import codecs
import gzip
import io
import lzma
import pathlib
import struct
from typing import NamedTuple
import zlib

import numpy as np
import scipy.sparse
from sklearn import datasets as sklearn_datasets

from ..lab import flags
from ..lab import folders

BUNDLED = pathlib.Path(__file__).parent / 'bundled'
NAMES = ('mushrooms', 'breast_cancer', 'digits', 'mnist')
MAX_COLUMNS, MAX_NUMBERS = 10**8, 10**9
_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801


class Dataset(NamedTuple):
  """Rows of features and their classes.

  Attributes:
    name: Its name in tables.
    features: Dense float64 [rows, columns], or a SciPy CSR matrix.
    labels: int [rows], from 0 to classes - 1, in the order of ``classes``.
    classes: The labels as they stand in the file, sorted.
  """

  name: str
  features: np.ndarray | scipy.sparse.csr_matrix
  labels: np.ndarray
  classes: np.ndarray


def load(
  name: str, data_dir: str = '', num_features: int | None = None
) -> Dataset:
  """Loads a data set.

  Args:
    name: ``mushrooms`` (bundled), ``breast_cancer`` or ``digits``
      (scikit-learn; breast_cancer standardized, digits scaled to [0, 1]),
      ``mnist`` (an IDX pair in ``data_dir``), ``openml:NAME`` (downloaded), a
      LIBSVM file or an IDX image file by path, or the name of a LIBSVM file in
      ``data_dir``.
    data_dir: Folder searched, with its subfolders, for what is no path.
    num_features: Number of columns, where a LIBSVM file lacks the last ones.

  Returns:
    A `Dataset`.

  Raises:
    UserError: The file is missing or malformed; the message says which line.
  """
  if name == 'mushrooms':
    return _libsvm(name, BUNDLED / 'mushrooms.libsvm.gz', num_features)
  if name in ('breast_cancer', 'digits'):
    return _from_sklearn(name)
  if name.startswith('openml:'):
    return _from_openml(name.removeprefix('openml:'))
  path = find(name, data_dir)
  if '-idx3-' in path.name:
    return _idx(name, path)
  return _libsvm(name, path, num_features)


def signs(dataset: Dataset) -> np.ndarray:
  """Labels as -1 and +1, where +1 is the larger label of the file.

  Args:
    dataset: A data set with two classes.

  Returns:
    float64 [rows].

  Raises:
    UserError: There are more or fewer classes than two.
  """
  if len(dataset.classes) != 2:
    shown = ', '.join(str(label) for label in dataset.classes[:5])
    more = ', ...' if len(dataset.classes) > 5 else ''
    raise flags.UserError(
      f'{dataset.name}: labels are not binary, they have'
      f' {len(dataset.classes)} values ({shown}{more}); use'
      ' experiments.softmax_regression'
    )
  return 2.0 * dataset.labels - 1.0


def dense(dataset: Dataset) -> np.ndarray:
  """The features as a dense float64 array."""
  if isinstance(dataset.features, np.ndarray):
    return dataset.features
  rows, columns = dataset.features.shape
  if rows * columns > MAX_NUMBERS:
    raise flags.UserError(
      f'{dataset.name}: {rows} rows of {columns} columns are too many numbers,'
      f' more than {MAX_NUMBERS:,}'
    )
  return dataset.features.toarray()


def check_range(dataset: Dataset, precision: str) -> None:
  """Raises a `UserError` where sums of squares of the data are not finite."""
  features = dataset.features
  dense = isinstance(features, np.ndarray)
  numbers = np.asarray(features if dense else features.data)
  most = float(np.max(np.abs(numbers)))
  if most > (float(np.finfo(precision).max) / numbers.size) ** 0.5:
    raise flags.UserError(
      f'{dataset.name}: has numbers up to {most:.3g}, whose squares {precision}'
      ' does not hold; scale the columns'
    )


def _dataset(name, features, labels) -> Dataset:
  classes, index = np.unique(labels, return_inverse=True)
  if len(classes) < 2:
    raise flags.UserError(
      f'{name}: all rows have the label {classes[0]}, there is nothing to tell'
      ' apart'
    )
  return Dataset(name, features, index, classes)


def _from_sklearn(name: str) -> Dataset:
  bunch = getattr(sklearn_datasets, f'load_{name}')()
  features = bunch.data
  if name == 'digits':
    features = features / 16.0
  else:
    features = (features - features.mean(0)) / features.std(0)
  return _dataset(name, features, bunch.target)


def _from_openml(name: str) -> Dataset:
  try:
    bunch = sklearn_datasets.fetch_openml(name, as_frame=False, parser='auto')
    features = np.asarray(bunch.data, np.float64)
  except (OSError, ValueError) as error:
    raise flags.UserError(
      f'OpenML data set {name} could not be loaded: {error}'
    ) from error
  return _dataset(name, features, bunch.target)


def find(name: str, data_dir: str) -> pathlib.Path:
  """The file of a data set, or a `flags.UserError` that says what there is."""
  if pathlib.Path(name).is_file():
    return pathlib.Path(name)
  folder = pathlib.Path(data_dir) if data_dir else None
  if folder is not None:
    if not folder.is_dir():
      raise flags.UserError(f'--data_dir={data_dir}: no such folder')
    patterns = [name, f'{name}_training.libsvm*', f'{name}.libsvm*']
    if name == 'mnist':
      patterns = ['train-images-idx3-*', '*-images-idx3-*']
    for pattern in patterns:
      found = sorted(folder.rglob(pattern))
      if found:
        return found[0]
  where = f' in {data_dir}' if data_dir else ''
  raise flags.UserError(
    f'no data set {name}{where}: give one of {", ".join(NAMES)}, openml:NAME,'
    ' or a file, or the folder that holds it by --data_dir'
  )


# How a packed file begins, whatever its name.
_PACKED = {
  b'\x1f\x8b': gzip.decompress, b'BZh': bz2.decompress,
  b'\xfd7zXZ\0': lzma.decompress,
}  # fmt: skip


def read(path: pathlib.Path) -> bytes:
  """What is in a file, unpacked; a `flags.UserError` if it cannot be read."""
  content = folders.content(path)
  try:
    for mark, unpack in _PACKED.items():
      named = path.suffix == '.gz' and unpack is gzip.decompress
      if named or content.startswith(mark):
        content = unpack(content)
    return content.removeprefix(codecs.BOM_UTF8)
  except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
    raise flags.UserError(f'{path}: {error}') from error


def _libsvm(name, path: pathlib.Path, num_features) -> Dataset:
  content = read(path)
  try:
    loaded = sklearn_datasets.load_svmlight_file(
      io.BytesIO(content), n_features=num_features, zero_based=False
    )
  except (ValueError, OSError, IndexError, OverflowError) as error:
    bad = _first_bad_line(content)
    reason = f'line {bad[0]} is not "label index:value ...": {bad[1]}'
    raise flags.UserError(f'{path}: {reason if bad[0] else error}') from error
  features, labels = scipy.sparse.csr_matrix(loaded[0]), loaded[1]
  if not len(labels):
    raise flags.UserError(f'{path}: has no rows')
  bad = np.flatnonzero(~np.isfinite(labels))
  if len(bad):
    raise flags.UserError(
      f'{path}: row {bad[0] + 1} has the label {labels[bad[0]]}'
    )
  if not features.nnz:
    raise flags.UserError(f'{path}: no row has a feature, "index:value"')
  if features.shape[1] > MAX_COLUMNS:
    row = np.searchsorted(
      features.indptr, np.argmax(features.indices), side='right'
    )
    raise flags.UserError(
      f'{path}: row {row} has the index {features.shape[1]}, more than'
      f' {MAX_COLUMNS:,}'
    )
  bad = np.flatnonzero(~np.isfinite(features.data))
  if len(bad):
    row = np.searchsorted(features.indptr, bad[0], side='right')
    raise flags.UserError(f'{path}: row {row} has a value that is not finite')
  return _dataset(name, features, labels)


def _first_bad_line(content: bytes) -> tuple[int, str]:
  """Number and text of the first malformed line, or (0, '')."""
  for number, raw in enumerate(content.decode('latin-1').split('\n'), 1):
    words = raw.split('#')[0].split()
    try:
      if words:
        float(words[0])
      last = 0
      for word in words[1:]:
        index, value = word.split(':')
        float(value)
        if int(index) > MAX_COLUMNS:
          return number, f'{word!r} (an index is at most {MAX_COLUMNS:,})'
        if int(index) <= last:
          return number, f'{raw.strip()[:60]!r} (indices must increase from 1)'
        last = int(index)
    except ValueError:
      return number, repr(raw.strip()[:60])
  return 0, ''


def _idx_array(path: pathlib.Path, magic: int) -> np.ndarray:
  content = read(path)
  dimensions = magic & 0xFF
  head = 4 + 4 * dimensions
  if len(content) < head or struct.unpack('>I', content[:4])[0] != magic:
    raise flags.UserError(f'{path}: not an IDX file of {dimensions} dimensions')
  shape = struct.unpack(f'>{dimensions}I', content[4:head])
  if not np.prod(shape):
    raise flags.UserError(f'{path}: has nothing in its shape {shape}')
  if len(content) - head != np.prod(shape):
    raise flags.UserError(
      f'{path}: is cut short: {len(content) - head} bytes for shape {shape}'
    )
  return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _idx(name, path: pathlib.Path) -> Dataset:
  """An IDX pair: the images' file names its labels' file."""
  images = _idx_array(path, _IDX_IMAGES)
  other = path.name.replace('images-idx3', 'labels-idx1')
  labels = _idx_array(path.with_name(other), _IDX_LABELS)
  if len(images) != len(labels):
    raise flags.UserError(
      f'{path}: has {len(images)} images, but {other} has {len(labels)} labels'
    )
  return _dataset(name, images.reshape(len(images), -1) / 255.0, labels)
