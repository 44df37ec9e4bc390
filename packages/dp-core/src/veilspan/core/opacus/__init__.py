"""Bridge to Opacus: our norms in its ghost clipping, its accountant behind our step.

Opacus is optional (`pip install veilspan-core[opacus]`): it is imported when a function of this
package is called. Nothing of Opacus is patched; one engine gets rules of its own.
"""

from veilspan.core.opacus.accountant import opacus_accountant
from veilspan.core.opacus.norms import OpacusNorms, use_veilspan_norms

__all__ = ["OpacusNorms", "opacus_accountant", "use_veilspan_norms"]
