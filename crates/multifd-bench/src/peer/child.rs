//! A child process, this program or another. It communicates in lines and is killed when dropped.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::Result;

pub(crate) struct Talker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Talker {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self { child, input, output })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().ok_or("its input is closed")?;
        Ok(input.write_all(format!("{line}\n").as_bytes())?)
    }

    pub(crate) fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err(
                format!("process {} has ended too early: {:?}", self.pid(), self.child.wait()?).into()
            );
        }
        Ok(line.trim_end().to_owned())
    }

    /// Closes its input and waits until it has ended successfully.
    pub(crate) fn end(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("process {} ended with {status}", self.pid()).into())
        }
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // Normally it has ended already; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
