//! What a certificate says.

use crate::error::{Error, ErrorKind};
use std::fmt::Write;
use std::io;
use std::net::IpAddr;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::time::ASN1Time;
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// The most of a peer's text that goes into a message.
const SHOWN_MAX: usize = 256;

/// What a certificate says about its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Certificate {
    /// The holder's whole name in the order of the certificate: `C=UK,O=Vellum,CN=host`.
    pub subject: String,
    /// The last common name of the subject.
    pub common_name: Option<String>,
    /// DNS names, IP addresses and URIs of the holder (`subjectAltName`).
    pub names: Vec<String>,
    /// The whole name of who signed it.
    pub issuer: String,
    /// The first second it is valid, since 1970.
    pub not_before: i64,
    /// The last second it is valid, since 1970.
    pub not_after: i64,
    /// Whether it belongs to an issuer of certificates.
    pub is_ca: bool,
    /// Whether its key may sign handshakes (`digitalSignature`, or no key usage at all).
    pub may_sign: bool,
    /// Whether its key may sign certificates (`keyCertSign`, or no key usage at all).
    pub may_certify: bool,
}

impl Certificate {
    /// Reads a certificate in DER form. Nothing is verified.
    ///
    /// # Errors
    /// [`ErrorKind::TlsCertificateBad`].
    pub fn from_der(der: &[u8]) -> io::Result<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|error| {
            Error::new(ErrorKind::TlsCertificateBad, format!("the certificate cannot be read: {error}"))
        })?;
        Ok(Self::of(&parsed))
    }

    fn of(parsed: &X509Certificate<'_>) -> Self {
        let usage = parsed.key_usage().ok().flatten().map(|found| found.value);
        let common_name = parsed.subject().iter_common_name().last();
        Self {
            subject: distinguished_name(parsed.subject()),
            common_name: common_name.and_then(|name| name.as_str().ok()).map(str::to_owned),
            names: alternative_names(parsed),
            issuer: distinguished_name(parsed.issuer()),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
            is_ca: parsed.is_ca(),
            may_sign: usage.is_none_or(|usage| usage.digital_signature()),
            may_certify: usage.is_none_or(|usage| usage.key_cert_sign()),
        }
    }

    /// The certificate for a message: its subject (or its first name) and when it is valid.
    pub(super) fn describe(&self) -> String {
        let whom = if self.subject.is_empty() { self.names.join(", ") } else { self.subject.clone() };
        let (from, to) = (day(self.not_before), day(self.not_after));
        format!("\"{}\" (valid from {from} to {to})", shown(&whom))
    }

    /// Its names for a message.
    pub(super) fn describe_names(&self) -> String {
        match self.names.as_slice() {
            [] => "no name at all (it has no subjectAltName)".to_owned(),
            names => shown(&names.join(", ")),
        }
    }
}

fn alternative_names(parsed: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(found)) = parsed.subject_alternative_name() else { return Vec::new() };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => ip_address(bytes).map(|address| address.to_string()),
        _ => None,
    };
    found.value.general_names.iter().filter_map(text).collect()
}

fn ip_address(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// `C=UK,CN=host`, in the order of the certificate, with the escapes of RFC 4514.
fn distinguished_name(name: &X509Name<'_>) -> String {
    let mut text = String::new();
    for relative in name.iter() {
        for (at, attribute) in relative.iter().enumerate() {
            if at > 0 {
                text.push('+');
            } else if !text.is_empty() {
                text.push(',');
            }
            push_attribute(&mut text, attribute);
        }
    }
    text
}

fn push_attribute(text: &mut String, attribute: &AttributeTypeAndValue<'_>) {
    let kind = attribute.attr_type();
    match oid2abbrev(kind, oid_registry()) {
        Ok(short) => text.push_str(short),
        Err(_) => text.push_str(&kind.to_id_string()),
    }
    text.push('=');
    let Ok(value) = attribute.as_str() else {
        text.push('#');
        for byte in attribute.as_slice() {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        return;
    };
    for (at, letter) in value.chars().enumerate() {
        match letter {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => text.extend(['\\', letter]),
            '#' | ' ' if at == 0 => text.extend(['\\', letter]),
            letter if letter.is_control() => {
                let _ = write!(text, "\\{:02X}", u32::from(letter));
            }
            letter => text.push(letter),
        }
    }
}

/// A second since 1970 as text: `2026-11-20 20:40:09 UTC`.
pub(super) fn day(seconds: i64) -> String {
    let Ok(time) = ASN1Time::from_timestamp(seconds) else { return format!("second {seconds} of 1970") };
    let time = time.to_datetime();
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02} UTC",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

/// Text from a peer, made harmless for a terminal or log and cut to a bearable length.
pub(super) fn shown(text: &str) -> String {
    let mut safe: String = text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_MAX).is_some() {
        safe.push_str("...");
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    fn sample() -> Certificate {
        let names = ["host.example.org".to_owned(), "::1".to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "UK");
        params.distinguished_name.push(DnType::CommonName, "a,CN=b");
        params.not_before = rcgen::date_time_ymd(2001, 2, 3);
        let key = KeyPair::generate().expect("key");
        Certificate::from_der(params.self_signed(&key).expect("certificate").der()).expect("readable")
    }

    #[test]
    fn a_certificate_tells_its_names() {
        let read = sample();
        // The comma cannot make a second common name.
        assert_eq!(read.subject, "C=UK,CN=a\\,CN=b");
        assert_eq!(read.common_name.as_deref(), Some("a,CN=b"));
        assert_eq!(read.names, ["host.example.org", "::1"]);
        assert!(!read.is_ca && read.may_sign && read.may_certify);
        assert!(read.describe().contains("valid from 2001-02-03 00:00:00 UTC to"), "{}", read.describe());
    }

    #[test]
    fn rubbish_is_no_certificate() {
        let error = Certificate::from_der(b"rubbish").expect_err("no certificate");
        assert_eq!(crate::kind_of(&error), Some(ErrorKind::TlsCertificateBad));
    }

    #[test]
    fn text_of_peers_is_harmless_and_short() {
        assert_eq!(shown("a\x1b[2J"), "a\\u{1b}[2J");
        assert_eq!(shown(&"x".repeat(1000)).len(), SHOWN_MAX + 3);
    }
}
