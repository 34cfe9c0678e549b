//! `drystone set` and `unset`: flags and thresholds of the whole cluster.

use super::Global;
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{self, Table};
use clap::{Args, ValueEnum};
use placement::Settings;

/// A setting on the command line.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Name {
    /// No recovery in the background where copies are lacking; a write still recovers its object first
    Norecover,
    /// No copying in the background where all copies are there and only in the wrong place
    Norebalance,
    /// No scrubs by schedule; those asked for are made
    Noscrub,
    /// How full a slice may be until `status` warns
    Nearfull,
    /// How full a slice may be until recovery in the background puts no more on it
    Backfillfull,
    /// How full a slice may be until writes that need more space fail
    Full,
}

/// All of them, as `set` without arguments shows them.
const NAMES: [Name; 6] =
    [Name::Norecover, Name::Norebalance, Name::Noscrub, Name::Nearfull, Name::Backfillfull, Name::Full];

/// Where in the settings something is.
enum Place<'a> {
    Flag(&'a mut bool),
    Percent(&'a mut u8),
}

impl Name {
    fn place(self, settings: &mut Settings) -> Place<'_> {
        match self {
            Self::Norecover => Place::Flag(&mut settings.norecover),
            Self::Norebalance => Place::Flag(&mut settings.norebalance),
            Self::Noscrub => Place::Flag(&mut settings.noscrub),
            Self::Nearfull => Place::Percent(&mut settings.nearfull_percent),
            Self::Backfillfull => Place::Percent(&mut settings.backfillfull_percent),
            Self::Full => Place::Percent(&mut settings.full_percent),
        }
    }

    fn text(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn value(self, settings: &Settings) -> String {
        match self.place(&mut settings.clone()) {
            Place::Flag(on) => if *on { "on" } else { "off" }.to_owned(),
            Place::Percent(percent) => format!("{percent}%"),
        }
    }
}

/// What to set.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  drystone set                        what is set now
  drystone set norebalance            before several nodes are added
  drystone set nearfull 80%

`drystone status` warns of flags that are set.")]
pub struct SetArgs {
    /// Which
    #[arg(value_enum)]
    pub name: Option<Name>,
    /// For a threshold: 85% or 0.85
    #[arg(value_parser = percent)]
    pub value: Option<u8>,
}

/// What to unset.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  drystone unset norebalance")]
pub struct UnsetArgs {
    /// Which
    #[arg(value_enum)]
    pub name: Name,
}

fn percent(text: &str) -> Result<u8, String> {
    let bad = || format!("'{text}' is no threshold: write 85% or 0.85");
    let value = match text.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<u8>().map_err(|_| bad())?,
        None => {
            let part: f64 = text.parse().map_err(|_| bad())?;
            let percent = (part * 100.0).round();
            if !(0.0..=1.0).contains(&part) || (percent / 100.0 - part).abs() > 1e-9 {
                return Err(bad());
            }
            percent as u8
        }
    };
    if value <= 100 { Ok(value) } else { Err(bad()) }
}

/// Runs `set`.
pub fn set(global: &Global, args: &SetArgs) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    let Some(name) = args.name else {
        let settings = cluster.settings()?;
        return if global.json { output::json(&settings) } else { show(&settings) };
    };
    let refused =
        |why: &str| Err(CliError::Refused { what: format!("set {}", name.text()), why: why.to_owned() });
    match (name.place(&mut Settings::default()), args.value) {
        (Place::Flag(_), Some(_)) => return refused("a flag has no value; `drystone unset` clears it"),
        (Place::Percent(_), None) => return refused("a threshold needs a value, like 85%"),
        _ => {}
    }
    let settings = cluster.change_settings(|settings| match name.place(settings) {
        Place::Flag(on) => *on = true,
        Place::Percent(percent) => *percent = args.value.unwrap_or(*percent),
    })?;
    output::done(global, &format!("{} is {}", name.text(), name.value(&settings)))
}

/// Runs `unset`.
pub fn unset(global: &Global, args: &UnsetArgs) -> Result<(), CliError> {
    let name = args.name;
    let settings = Cluster::connect(global)?.change_settings(|settings| {
        match (name.place(settings), name.place(&mut Settings::default())) {
            (Place::Flag(on), _) => *on = false,
            (Place::Percent(percent), Place::Percent(usual)) => *percent = *usual,
            (Place::Percent(_), Place::Flag(_)) => {}
        }
    })?;
    output::done(global, &format!("{} is {}", name.text(), name.value(&settings)))
}

fn show(settings: &Settings) -> Result<(), CliError> {
    let mut table = Table::new(&["SETTING", "VALUE"]);
    for name in NAMES {
        table.row([name.text(), name.value(settings)]);
    }
    table.print()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_percentages_or_parts_of_one() {
        assert_eq!(
            (percent("85%"), percent("0.85"), percent("1"), percent("0.07")),
            (Ok(85), Ok(85), Ok(100), Ok(7))
        );
        for bad in ["85", "101%", "-1%", "1.01", "0.855", "NaN", "inf", "", "%", "8 5%"] {
            assert!(percent(bad).is_err(), "{bad:?} is taken");
        }
    }

    #[test]
    fn every_setting_has_its_own_place() {
        for name in NAMES {
            let mut settings = Settings::default();
            match name.place(&mut settings) {
                Place::Flag(on) => *on = true,
                Place::Percent(percent) => *percent += 1,
            }
            let changed = |other: &Name| other.value(&settings) != other.value(&Settings::default());
            assert_eq!(NAMES.into_iter().filter(changed).collect::<Vec<_>>(), [name]);
        }
    }
}
