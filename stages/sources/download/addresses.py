"""Which network addresses are on the public internet."""

from ipaddress import IPv4Address, ip_address, ip_network

_NAT64 = ip_network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT; metadata of Alibaba Cloud
        "168.63.129.16/32",  # the host of an Azure machine
        "192.0.0.0/24",  # protocol assignments; metadata of Oracle Cloud
        "192.88.99.0/24",  # 6to4 relays
        "::ffff:0:0/96",  # IPv4-mapped
        "2001::/23",  # Teredo and other protocol assignments
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fec0::/10",  # site-local
    )
)


def is_public(address: str) -> bool:
    """Whether an IP address may be that of a public server.

    False for loopback, private, link-local (cloud metadata), multicast, reserved and unspecified addresses,
    carrier-grade NAT, and IPv6 that stands for IPv4. Only NAT64, through which IPv6-only machines see the IPv4
    internet, is judged by the IPv4 address in it.

    Raises:
        ValueError: not an IP address.
    """
    ip = ip_address(address.partition("%")[0])
    if ip in _NAT64:
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not (
        ip.is_multicast or ip.is_reserved or ip.is_unspecified or any(ip in network for network in _NOT_PUBLIC)
    )
