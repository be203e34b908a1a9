//! Connections that can be cut at any moment.

use std::{
    io,
    sync::{Arc, Mutex},
};

use multifd::channel::{Address, Connect, Context, Link, Listener, Wake};

/// Connects to an address, and remembers what cuts each connection.
#[derive(Clone)]
pub(crate) struct Network {
    address: Address,
    cuts: Arc<Mutex<Vec<Arc<dyn Wake>>>>,
}

impl Network {
    pub(crate) fn listen() -> (Listener, Self) {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
        let address = listener.local_address().clone();
        (listener, Self { address, cuts: Arc::default() })
    }

    /// Cuts all connections, or the one with this number, counted from those that were not cut.
    pub(crate) fn cut(&self, which: Option<usize>) {
        let mut cuts = self.cuts.lock().expect("whole");
        let cut = match which {
            Some(number) if !cuts.is_empty() => {
                let number = number % cuts.len();
                vec![cuts.remove(number)]
            }
            _ => std::mem::take(&mut *cuts),
        };
        drop(cuts);
        cut.iter().for_each(|cut| cut.wake());
    }
}

impl Connect for Network {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let link = self.address.connect(context)?;
        self.cuts.lock().expect("whole").push(link.waker());
        Ok(link)
    }

    fn target(&self) -> String {
        self.address.target()
    }
}
