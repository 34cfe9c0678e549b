//! (drystone_fio)
