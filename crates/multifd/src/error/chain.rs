//! An error with its causes, for people to read: the one place that prints a chain.

use std::{
    error::Error,
    fmt::{self, Write},
};

use super::untrusted::Escape;

/// An error and its causes, the error first. `Display` writes all texts with `: ` between them, escaped as
/// [`Printable`](super::Printable) is; the iterator returns the errors one by one.
#[derive(Clone, Debug)]
pub struct Chain<'a>(Option<&'a (dyn Error + 'static)>);

/// The chain of `error`, which may be of any type.
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(Some(error))
}

impl<'a> Iterator for Chain<'a> {
    type Item = &'a (dyn Error + 'static);

    fn next(&mut self) -> Option<Self::Item> {
        let error = self.0.take()?;
        self.0 = error.source();
        Some(error)
    }
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.clone().enumerate() {
            let between = if at == 0 { "" } else { ": " };
            write!(Escape(f), "{between}{error}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::wire::ChannelId;

    #[test]
    fn causes_follow_in_order() {
        let broken = crate::Error::io("write to 127.0.0.1:1", io::ErrorKind::BrokenPipe.into());
        let error = crate::Error::other("the main stream failed", broken).on_channel(ChannelId(3));
        let expected = "channel 3: the main stream failed: write to 127.0.0.1:1: broken pipe";
        assert_eq!(chain(&error).to_string(), expected);
        assert_eq!(chain(&error).skip(1).count(), 2);
    }
}
