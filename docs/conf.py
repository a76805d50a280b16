"""Configuration of the documentation: `make docs`."""

import os
import pathlib
import re
import shutil
import sys

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math import latex2mathml
import optax
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The kernels that run the pages' cells import the same optlab.
os.environ['PYTHONPATH'] = os.pathsep.join(
  filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import optlab  # noqa: E402

project = 'optlab'
author = 'The optlab authors'
project_copyright = author
version = release = optlab.__version__

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
]
# The notebooks stand beside docs/; Sphinx reads what is below it.
NOTEBOOKS = pathlib.Path(__file__).parent / 'notebooks'
NOTEBOOKS.mkdir(exist_ok=True)
for notebook in (ROOT / 'notebooks').glob('*.ipynb'):
  shutil.copy(notebook, NOTEBOOKS)

templates_path = ['_templates']
exclude_patterns = ['_build']

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['mathematics.css']
html_title = f'optlab {version}'
html_copy_source = False
html_math_renderer = 'mathml'

myst_enable_extensions = ['dollarmath', 'fieldlist']
myst_heading_anchors = 2
nb_execution_mode = 'force'
# `make notebooks` has executed these, and their outputs are kept.
nb_execution_excludepatterns = ['notebooks/*']
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = 'remove'

# `name` in a docstring is a link where the name is documented, else code.
default_role = 'py:obj'
add_function_parentheses = False
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
# The pages follow `__all__`.
autosummary_ignore_module_all = False
# File systems that ignore case have room for one of dense and Dense.
autosummary_filename_map = {
  'optlab.newton.Dense': 'optlab.newton.DenseOperator'
}

# Python writes out what these names stand for. Long ones come first: they
# contain the others.
ALIASES = {
  stringify_annotation(alias, 'smart'): name
  for name, alias in (
    ('InnerProducts', optlab.batches.InnerProducts),
    ('Route', optlab.batches.Route),
    ('Losses', optlab.batches.Losses),
    ('Schedule', optax.Schedule),
  )
}


# Commands that docutils lacks and these pages can do without.
REWRITTEN = {r'\tfrac': r'\frac', r'\dots': r'\ldots', r'\textstyle': ''}


def to_mathml(latex: str, block: bool) -> str:
  """MathML, which browsers draw by themselves: no script, no network."""
  for command, known in REWRITTEN.items():
    latex = latex.replace(command, known)
  # TeX takes one digit for each half of a fraction, docutils a whole number.
  latex = re.sub(r'\\frac *(\d)(\d)', r'\\frac{\1}{\2}', latex)
  # And keeps the backslash of a name's underscore.
  latex = re.sub(
    r'\\text\{[^}]*\}', lambda name: name[0].replace(r'\_', '_'), latex
  )
  # Browsers set no space between a name such as log and what it is applied to.
  latex = re.sub(r'\\log(?= *[A-Za-z\\|])', r'\\,\\log\\,', latex)
  try:
    return latex2mathml.tex2mathml(latex, as_block=block)
  except (MathError, AttributeError) as error:
    raise ExtensionError(f'{error} in the mathematics {latex!r}') from error


def visit_math(translator, node):
  """Writes inline mathematics."""
  translator.body.append(to_mathml(node.astext(), block=False))
  raise nodes.SkipNode


def visit_math_block(translator, node):
  """Writes displayed mathematics."""
  mathml = to_mathml(node.astext(), block=True)
  translator.body.append(f'<div class="math">{mathml}</div>\n')
  raise nodes.SkipNode


def shorten(app, what, name, obj, options, signature, returned):
  """Puts the names of aliases and functions back into a signature."""
  del app, what, name, obj, options
  for written, alias in ALIASES.items():
    signature = signature and signature.replace(written, alias)
    returned = returned and returned.replace(written, alias)
  # A default that is a function; Sphinx cannot parse the brackets.
  signature = signature and re.sub(r'<function (\w+)>', r'\1', signature)
  return signature, returned


def describe(app, what, name, obj, options, lines):
  """Gives an alias what its `#:` says, wherever in its wing that stands."""
  del app, obj, options
  wing, _, alias = name.rpartition('.')
  if what != 'data' or not wing.startswith('optlab.'):
    return
  for module in [m for m in sys.modules if f'{m}.'.startswith(f'{wing}.')]:
    found = ModuleAnalyzer.for_module(module).find_attr_docs()
    if ('', alias) in found:
      lines[:] = found['', alias]
      return


def find_home(app, env, node, contnode):
  """Links a public name, wherever it is written, to the page of its wing."""
  del app
  python = env.get_domain('py')
  name = node.get('reftarget', '').rpartition('.')[2]
  homes = [
    p
    for p in python.objects
    if re.fullmatch(rf'optlab\.\w+\.{re.escape(name)}', p)
  ]
  if node.get('refdomain') != 'py' or len(homes) != 1:
    return None
  page = python.objects[homes[0]]
  return make_refnode(
    env.app.builder, node['refdoc'], page.docname, page.node_id, contnode
  )


def setup(app):
  """Adds the renderer of mathematics and the shorter signatures."""
  app.connect('autodoc-process-signature', shorten)
  app.connect('autodoc-process-docstring', describe)
  app.connect('missing-reference', find_home)
  app.add_html_math_renderer(
    'mathml',
    inline_renderers=(visit_math, None),
    block_renderers=(visit_math_block, None),
  )
