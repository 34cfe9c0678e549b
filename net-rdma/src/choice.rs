//! Which transport a process uses, as its user says, and the transport that comes of it.

use crate::RdmaError;
use reactor::backend::Transport;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Environment variable with a `Choice` for clients that are not told otherwise.
pub const TRANSPORT_VARIABLE: &str = "DRYSTONE_TRANSPORT";

/// RDMA, TCP, or whichever works.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// RDMA where there is a device, with those peers that can be reached by it; TCP otherwise.
    #[default]
    Auto,
    /// As `Auto`, but without a device the process does not start.
    Rdma,
    /// TCP only.
    Tcp,
}

impl Choice {
    /// What `TRANSPORT_VARIABLE` says; `Auto` when it is not set or says something else.
    pub fn from_environment() -> Self {
        let Ok(text) = std::env::var(TRANSPORT_VARIABLE) else { return Self::default() };
        text.parse().unwrap_or_else(|error: ChoiceError| {
            tracing::warn!(%error, variable = TRANSPORT_VARIABLE, "ignored");
            Self::default()
        })
    }
}

/// Not a transport.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{0}' is no transport: write auto, rdma or tcp")]
pub struct ChoiceError(String);

impl FromStr for Choice {
    type Err = ChoiceError;

    fn from_str(text: &str) -> Result<Self, ChoiceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "rdma" => Ok(Self::Rdma),
            "tcp" => Ok(Self::Tcp),
            other => Err(ChoiceError(other.to_owned())),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        })
    }
}

/// A choice and which device to make it with.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// The choice.
    pub choice: Choice,
    /// The device's name; otherwise the first that has `address`, or else the first that works.
    pub device: Option<String>,
    /// The address that this process is reached at.
    pub address: Option<IpAddr>,
}

/// Makes a TCP transport.
pub type MakeTcp = fn() -> Box<dyn Transport>;

impl Plan {
    /// The transport of one core, made on its thread. `tcp` makes one that declines offers of RDMA, `beneath` one that
    /// leaves them to whoever lies above. With `Choice::Auto` it never fails.
    pub fn transport(&self, tcp: MakeTcp, beneath: MakeTcp) -> Result<Box<dyn Transport>, RdmaError> {
        if self.choice == Choice::Tcp {
            return Ok(tcp());
        }
        match self.rdma(beneath) {
            Err(error) if self.choice == Choice::Auto => {
                tracing::debug!(%error, "connections use TCP");
                Ok(tcp())
            }
            made => made,
        }
    }

    /// Whether the choice can be made here: an error says why a process that must have RDMA cannot start.
    pub fn check(&self) -> Result<(), RdmaError> {
        if self.choice == Choice::Rdma { self.try_device() } else { Ok(()) }
    }

    #[cfg(feature = "rdma")]
    fn device(&self) -> Result<crate::Device, RdmaError> {
        let (name, address) = (self.device.clone(), self.address.filter(|ip| !ip.is_unspecified()));
        crate::Device::open(&crate::DeviceOptions { name, address, ..Default::default() })
    }

    #[cfg(feature = "rdma")]
    fn try_device(&self) -> Result<(), RdmaError> {
        self.device().map(|_| ())
    }

    #[cfg(feature = "rdma")]
    fn rdma(&self, beneath: MakeTcp) -> Result<Box<dyn Transport>, RdmaError> {
        Ok(Box::new(crate::RdmaTransport::over(beneath(), self.device()?)))
    }

    #[cfg(not(feature = "rdma"))]
    fn try_device(&self) -> Result<(), RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    #[cfg(not(feature = "rdma"))]
    fn rdma(&self, _: MakeTcp) -> Result<Box<dyn Transport>, RdmaError> {
        Err(RdmaError::NotBuilt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for choice in [Choice::Auto, Choice::Rdma, Choice::Tcp] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("infiniband".parse::<Choice>().unwrap_err().to_string().contains("auto, rdma or tcp"));
    }

    #[test]
    fn without_a_device_auto_is_tcp_and_rdma_an_error() {
        fn none() -> Box<dyn Transport> {
            Box::new(reactor::backend::NoTransport::default())
        }
        let plan = |choice| Plan { choice, device: Some("no-such-device".to_owned()), address: None };
        assert!(plan(Choice::Auto).transport(none, none).is_ok());
        assert!(plan(Choice::Rdma).transport(none, none).is_err());
        assert!(plan(Choice::Rdma).check().is_err() && plan(Choice::Auto).check().is_ok());
    }
}
