//! `iperf3 -P N`: the throughput of this machine's sockets when the bytes are not processed.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use super::{Peer, Sample};
use crate::Result;

pub(crate) struct Iperf {
    server: Child,
    port: u16,
    streams: u8,
    bytes: u64,
}

impl Iperf {
    /// # Errors
    /// If there is no iperf3.
    pub(crate) fn start(streams: u8, bytes: u64) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let server = Command::new("iperf3")
            .args(["-s", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("iperf3 (`apt-get install iperf3`): {error}"))?;
        Ok(Self { server, port, streams, bytes })
    }

    fn client(&self) -> Result<Value> {
        let output = Command::new("iperf3")
            .args(["-c", "127.0.0.1", "-J", "-p", &self.port.to_string(), "-P", &self.streams.to_string()])
            .args(["-n", &self.bytes.to_string()])
            .stdin(Stdio::null())
            .output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

impl Peer for Iperf {
    fn round(&mut self) -> Result<Sample> {
        for _ in 0..PATIENCE {
            let told = self.client()?;
            let sum = &told["end"]["sum_received"];
            if let (Some(bytes), Some(seconds)) = (sum["bytes"].as_u64(), sum["seconds"].as_f64()) {
                return Ok(Sample { seconds, bytes, ..Sample::default() });
            }
            // The server is not listening yet, or has just ended the round before.
            std::thread::sleep(Duration::from_millis(50));
        }
        Err("iperf3 accepts no connection".into())
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

const PATIENCE: usize = 100;
