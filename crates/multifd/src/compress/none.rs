//! No compression: pages are sent from guest memory and received into it without a buffer between.

use super::codec::Description;
use crate::wire::Flags;

pub(super) const METHOD: Description =
    Description { name: "none", flags: Flags(0), level: None, encoder: |_| Ok(None), decoder: |_| Ok(None) };
