//! The switch for deliberate bugs, with which tests and the simulator prove that they can see. Each room
//! has its own list of bugs; without the feature `planted` none can be chosen and every question folds to
//! `false`, so that nothing of this is left in a shipped binary.

#[cfg(not(feature = "planted"))]
use std::marker::PhantomData;

/// Which bug of the list `B` is planted, if any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planted<B> {
    #[cfg(feature = "planted")]
    bug: Option<B>,
    #[cfg(not(feature = "planted"))]
    none: PhantomData<B>,
}

impl<B: Copy + PartialEq> Planted<B> {
    /// No bug.
    pub fn none() -> Self {
        Self::default()
    }

    /// This bug.
    #[cfg(feature = "planted")]
    pub fn with(bug: B) -> Self {
        Self { bug: Some(bug) }
    }

    /// Whether this very bug is planted.
    #[inline]
    pub fn has(self, _bug: B) -> bool {
        #[cfg(feature = "planted")]
        {
            self.bug == Some(_bug)
        }
        #[cfg(not(feature = "planted"))]
        {
            false
        }
    }
}

impl<B> Default for Planted<B> {
    fn default() -> Self {
        Self {
            #[cfg(feature = "planted")]
            bug: None,
            #[cfg(not(feature = "planted"))]
            none: PhantomData,
        }
    }
}
