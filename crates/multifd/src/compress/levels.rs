//! The compression level of each method.

use super::Method;
use crate::error::{Result, Usage};

/// A level for each method. Only the level of the method in use has an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Levels([u8; Method::ALL.len()]);

impl Default for Levels {
    fn default() -> Self {
        let mut levels = Self([0; Method::ALL.len()]);
        for method in Method::ALL {
            let default = method.level().map_or(0, |level| level.parameter.default);
            *levels.place(*method) = u8::try_from(default).unwrap_or(u8::MAX);
        }
        levels
    }
}

impl Levels {
    /// Sets the level. Does nothing for a method without levels.
    pub(crate) fn set(&mut self, method: Method, level: u8) {
        if method.level().is_some() {
            *self.place(method) = level;
        }
    }

    pub(crate) fn of(mut self, method: Method) -> u8 {
        *self.place(method)
    }

    /// # Errors
    /// If the level is outside its range.
    pub(crate) fn check(self) -> Result<(), Usage> {
        let leveled = Method::ALL.iter().filter_map(|method| Some((method.level()?, self.of(*method))));
        leveled.into_iter().try_for_each(|(level, chosen)| level.parameter.check(chosen))
    }

    fn place(&mut self, method: Method) -> &mut u8 {
        &mut self.0[method as usize]
    }
}
