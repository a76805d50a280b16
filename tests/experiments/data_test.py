"""Loading data: every kind of file, and every kind of bad file."""

import bz2
import gzip
import lzma
import os
import struct

import numpy as np
import pytest

from experiments.lab import flags
from experiments.problems import characters
from experiments.problems import data
from experiments.problems import tabular
from experiments.problems import text as sentences


def test_mushrooms_is_bundled():
  dataset = data.load('mushrooms')
  assert dataset.features.shape == (8124, 112)
  labels = data.signs(dataset)
  # LIBSVM's label 1 stands for 3,916 rows, label 2 for 4,208.
  assert (np.sum(labels == 1), np.sum(labels == -1)) == (4208, 3916)
  assert data.dense(dataset).sum() == 21 * 8124  # 21 categories a row


def test_scikit_learns_data():
  cancer = data.load('breast_cancer')
  np.testing.assert_allclose(cancer.features.std(0), 1.0)
  digits = data.load('digits')
  assert digits.features.min() == 0.0
  assert digits.features.max() == 1.0
  assert len(digits.classes) == 10


def test_labels_that_are_not_binary():
  with pytest.raises(
    flags.UserError, match=r'digits: labels are not binary.*10'
  ):
    data.signs(data.load('digits'))


def test_files_by_path_and_by_name(tmp_path):
  text = '+1 1:0.5 3:2\n-1 2:1 # comment\n'
  (tmp_path / 'toy.libsvm').write_text(text)
  with gzip.open(tmp_path / 'packed_training.libsvm.gz', 'wt') as file:
    file.write(text)
  for name in (str(tmp_path / 'toy.libsvm'), 'toy', 'packed'):
    dataset = data.load(name, str(tmp_path))
    np.testing.assert_array_equal(
      data.dense(dataset), [[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]]
    )
    np.testing.assert_array_equal(data.signs(dataset), [1.0, -1.0])
  wide = data.load('toy', str(tmp_path), num_features=5)
  assert wide.features.shape == (2, 5)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('1 1:2\n2 1:x\n', r"line 2 is not .*'2 1:x'"),
    ('1 1:2\n\noops\n', r"line 3 is not .*'oops'"),
    ('1 2:1 1:1\n', r'line 1 is not .*indices must increase'),
    ('1 0:1\n', r'line 1 is not .*indices must increase from 1'),
    ('', 'has no rows'),
    ('1 1:2\n2 1:nan\n', 'row 2 has a value that is not finite'),
    ('1 1:2\nnan 1:1\n', 'row 2 has the label nan'),
    ('1\n2\n', 'no row has a feature'),
    ('1 1:2\n2 2000000000:1\n', 'row 2 has the index 2000000000'),
    ('1 1:2\n2 3000000000:1\n', 'line 2 .*at most 100,000,000'),
    ('1 1:2\n1 1:3\n', 'all rows have the label 1.0'),
  ],
)
def test_a_malformed_libsvm_file_names_its_line(tmp_path, text, words):
  path = tmp_path / 'bad.libsvm'
  path.write_text(text)
  with pytest.raises(flags.UserError, match=words):
    data.load(str(path))


def test_a_mark_of_the_byte_order_is_no_label(tmp_path):
  path = tmp_path / 'marked.libsvm'
  path.write_text('\ufeff+1 1:0.5\n-1 2:1\n', encoding='utf-8')
  assert data.load(str(path)).classes.tolist() == [-1.0, 1.0]


def test_what_is_too_large_is_said_before_it_is_made(tmp_path):
  path = tmp_path / 'wide.libsvm'
  path.write_text('1 90000000:1\n' + '2 1:1\n' * 20)
  with pytest.raises(flags.UserError, match='21 rows of 90000000 columns'):
    data.dense(data.load(str(path)))


def test_a_file_that_is_no_gzip(tmp_path):
  (tmp_path / 'bad.libsvm.gz').write_text('1 1:2\n')
  with pytest.raises(flags.UserError, match='Not a gzipped file'):
    data.load(str(tmp_path / 'bad.libsvm.gz'))


@pytest.mark.parametrize('pack', [gzip, bz2, lzma])
def test_packed_files_whatever_their_names(tmp_path, pack):
  packed = pack.compress(b'1 1:2\n-1 2:1\n')
  (tmp_path / 'a.libsvm').write_bytes(packed)
  assert data.load(str(tmp_path / 'a.libsvm')).features.shape == (2, 2)
  for bad in (packed[:-9], packed[:12] + packed[13:]):
    (tmp_path / 'a.libsvm').write_bytes(bad)
    with pytest.raises(flags.UserError, match='a.libsvm: '):
      data.load(str(tmp_path / 'a.libsvm'))


def test_damage_is_named_whoever_reads(tmp_path):
  """Gzip's checks are not errors of the system: each reader had its own."""
  packed = gzip.compress(b'3 how far is it ?\n' * 99)
  path = tmp_path / 'a.gz'
  readers = (
    sentences.read,
    tabular.read,
    lambda path: characters.read(str(path)),
  )
  for bad in (packed[:-9], packed[:12] + b'\xff' + packed[13:], b'plain'):
    path.write_bytes(bad)
    for read in readers:
      with pytest.raises(flags.UserError, match=r'a\.gz: '):
        read(path)
  path.unlink()
  os.mkfifo(path)  # Nobody writes to it.
  for read in readers[:2]:
    with pytest.raises(flags.UserError, match=r'a\.gz: '):
      read(path)


def test_a_row_is_not_taken_for_a_head(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('\ufeff1,2\n3,4\n', encoding='utf-8')
  assert tabular.read(path).tolist() == [[1, 2], [3, 4]]
  path.write_text('a,b\n3,4\n')
  assert tabular.read(path).tolist() == [[3, 4]]
  path.write_text('1,?\n3,4\n')
  with pytest.raises(flags.UserError, match="line 1 is not numbers: '1,\\?'"):
    tabular.read(path)


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(
    flags.UserError, match='no data set a9a: give one of mush'
  ):
    data.load('a9a')
  with pytest.raises(flags.UserError, match=f'no data set a9a in {tmp_path}'):
    data.load('a9a', str(tmp_path))
  with pytest.raises(flags.UserError, match='--data_dir=/nowhere: no such'):
    data.load('a9a', '/nowhere')


def write_idx(path, array, magic):
  head = struct.pack(f'>I{array.ndim}I', magic, *array.shape)
  path.write_bytes(head + array.astype(np.uint8).tobytes())


def test_an_idx_pair(tmp_path):
  images = np.arange(12).reshape(3, 2, 2) * 20
  write_idx(tmp_path / 't-images-idx3-ubyte', images, 0x803)
  write_idx(tmp_path / 't-labels-idx1-ubyte', np.array([7, 1, 7]), 0x801)
  dataset = data.load('mnist', str(tmp_path))
  np.testing.assert_allclose(dataset.features, images.reshape(3, 4) / 255.0)
  np.testing.assert_array_equal(dataset.classes[dataset.labels], [7, 1, 7])

  write_idx(tmp_path / 't-labels-idx1-ubyte', np.array([7, 1]), 0x801)
  with pytest.raises(
    flags.UserError, match='has 3 images, but .* has 2 labels'
  ):
    data.load('mnist', str(tmp_path))
  path = tmp_path / 't-images-idx3-ubyte'
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(flags.UserError, match='is cut short: 9 bytes for shape'):
    data.load('mnist', str(tmp_path))
  path.write_bytes(b'hello')
  with pytest.raises(flags.UserError, match='not an IDX file'):
    data.load('mnist', str(tmp_path))


def test_real_files(data_dir):
  a8a = data.load('a8a', str(data_dir))
  assert a8a.features.shape == (22696, 123)
  mnist = data.load('mnist', str(data_dir))
  assert mnist.features.shape == (10000, 784)
