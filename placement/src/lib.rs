//! (placement)
