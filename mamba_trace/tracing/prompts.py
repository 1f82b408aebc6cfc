"""How nnsight reads the prompt of a trace, for checks that must agree with it.

`as_encoding` merges an invoke's input and its keywords into one encoding, or gives ``None`` for text;
`input_key` names the model input that the encoding gives; `split` cuts a field of it into rows; `ROW_FIELDS`
are the fields that have rows.
"""

from nnsight.modeling.processing import ROW_FIELDS as ROW_FIELDS
from nnsight.modeling.processing import as_encoding as as_encoding
from nnsight.modeling.processing import input_key as input_key
from nnsight.modeling.processing import split as split
