//! What services tell the scenario that watches them.
