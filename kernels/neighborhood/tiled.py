from . import reference
unsupported_reason = reference.unsupported_reason
forward = reference.forward
