//! Every sample, for programs.

use serde_json::{Value, json};

use crate::measure::Measured;

pub(super) fn of(all: &[Measured]) -> Value {
    let cases = all.iter().map(|measured| {
        let case = &measured.case;
        let peers = measured.peers.iter().map(|(who, samples)| match samples {
            Err(reason) => json!({ "peer": who.label(), "not-measured": reason }),
            Ok(samples) => {
                let rounds = samples.0.iter().map(|sample| {
                    json!({
                        "seconds": sample.seconds,
                        "bytes": sample.bytes,
                        "cpu-seconds": sample.cpu,
                        "wire-bytes": sample.wire,
                        "memory-beyond-ram": sample.beyond,
                        "downtime-ms": sample.downtime,
                    })
                });
                json!({ "peer": who.label(), "rounds": rounds.collect::<Vec<_>>() })
            }
        });
        json!({
            "case": case.name,
            "about": case.about,
            "ram": case.setting.ram,
            "contents": case.setting.contents,
            "multifd-channels": case.setting.channels,
            "multifd-compression": case.setting.method,
            "tls": case.setting.tls,
            "peers": peers.collect::<Vec<_>>(),
        })
    });
    Value::Array(cases.collect())
}
