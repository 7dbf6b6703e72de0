//! The undo journal: every host side effect, written down before it happens.
