//! Tells a person what is being done: a bar on a terminal, plain lines elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// One thing that takes a while. Ends its line when dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// Begins something of `steps` steps (0: unknown) and says so on standard error.
    #[must_use]
    pub fn start(what: &str, steps: u64) -> Self {
        let terminal = console::user_attended_stderr();
        if !terminal {
            eprintln!("{what} …");
            return Self { bar: ProgressBar::hidden(), terminal };
        }
        let bar = if steps == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(steps) };
        let template =
            if steps == 0 { "{spinner} {prefix} {msg} ({elapsed})" } else { "{prefix} {wide_bar} {pos}/{len} {msg}" };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, terminal }
    }

    /// Says what the next step is.
    pub fn step(&self, what: &str) {
        if self.terminal {
            self.bar.set_message(what.to_owned());
        }
        self.bar.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
